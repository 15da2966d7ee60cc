"""The package's metadata is in setup.cfg, but for the description: README with links that work outside the repository.

With a URL of the repository in setup.cfg (`project_urls`, Source), links to files lead there. Without one they become
text that names the file; the sdist has the files.
"""

import re

import setuptools

FILE_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")  # [text](docs/page.md#place), and images


def description(readme: str, source: str) -> str:
    """README for a package index; `source` is the URL of the repository, "" where there is none."""

    def linked(link: re.Match[str]) -> str:
        image, text, file, place = link.groups("")
        return f"{image}[{text}]({source.rstrip('/')}/{'raw' if image else 'blob'}/main/{file}{place})"

    def named(link: re.Match[str]) -> str:
        text, file = link[2], f"`{link[3]}`"
        return file if text == link[3] else f"{text} ({file})"

    if source:
        return FILE_LINK.sub(linked, readme)
    title, rest = readme.split("\n\n", 1)
    note = "Files that are named here are in the source distribution."
    return f"{title}\n\n{note}\n\n" + FILE_LINK.sub(named, rest)


if __name__ == "__main__":
    import configparser

    settings = configparser.ConfigParser(interpolation=None)
    settings.read("setup.cfg", encoding="utf-8")
    urls = dict(line.split(" = ") for line in settings["metadata"]["project_urls"].split("\n") if line)
    with open("README.md", encoding="utf-8") as file:
        text = description(file.read(), urls.get("Source", ""))
    setuptools.setup(long_description=text, long_description_content_type="text/markdown")
