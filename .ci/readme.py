"""Print the bash and python blocks of a Markdown page as one bash script, in order; without a page, the pages to run.

The script prints each block before it runs, with the seconds since the start. Blocks of other languages are not run:
sh and py are those of commands that need published weights, other machines or an hour.
"""

import re
import shlex
import sys
from pathlib import Path

# `.ci/run` runs these pages in this order: each uses files that the commands of earlier ones create.
PAGES = (
    "README.md",
    "docs/chat.md",
    "docs/generate.md",
    "docs/embeddings.md",
    "docs/weights.md",
    "docs/training.md",
    "docs/evaluation.md",
    "docs/python.md",
    "docs/extending.md",
    "docs/scaling.md",
    "docs/serving.md",
)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

if __name__ == "__main__" and len(sys.argv) == 1:
    print(*PAGES, sep="\n")
elif __name__ == "__main__":
    for language, code in BLOCK.findall(Path(sys.argv[1]).read_text()):
        print(f"printf -- '--- after %d s: %s\\n' $SECONDS {shlex.quote(code)}")
        print(code if language == "bash" else f"python -c {shlex.quote(code)}")
