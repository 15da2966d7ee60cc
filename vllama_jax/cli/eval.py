"""vllama eval."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from vllama_jax.checkpoints.shipped import MODEL_NAME
from vllama_jax.cli._display import Display
from vllama_jax.cli._usage import Command, JsonFlag, UsageError, require_at_least
from vllama_jax.evaluate.benchmarks import BENCHMARKS, BenchmarkName
from vllama_jax.text.templates import TemplateName

MAX_LISTED_FAILURES = 5  # videos that could not be read


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """The command for the benchmark that the first argument names, its name, and its arguments."""
    if arguments[:1] == ["miniature"]:
        return miniature, "vllama eval miniature", arguments[1:]
    return benchmark, "vllama eval", arguments


def miniature(
    *,
    seed: int = 0,
    clips: int = 200,
    model: Path | None = None,
    audio_scale: float | None = None,
    measures: tuple[str, ...] = (),
    json_output: JsonFlag = False,
) -> None:
    """Ask a miniature about clips of its small world that are rendered now, of combinations that it never trained on.

    Example: vllama eval miniature --seed 7 --clips 200 --json

    Example: vllama eval miniature --measures motion motion_reversed sound_only

    docs/miniature.md says what each measure is.

    Args:
        seed: Of the clips.
        clips: How many files each measure is about.
        model: The model directory; the one that comes with the package unless given.
        audio_scale: The norm of a sound's vector; the model's own unless given.
        measures: Which to take, by name; all unless given. Only the clips that these are about are rendered.
        json_output: Print one JSON object: accuracy, n, chance and the accuracy's 95 % interval by kind of question.
    """
    from vllama_jax.miniature.evaluate import check_arguments, evaluate, format_measures
    from vllama_jax.model import load

    require_at_least(0, seed=seed)
    require_at_least(1, clips=clips)
    check_arguments(seed, clips, measures)  # before a model is loaded
    with Display(quiet=json_output) as display:
        loaded = load(model or MODEL_NAME, audio_scale=audio_scale)
        found = evaluate(loaded, seed, clips, display.show_status, measures)
    print(json.dumps(found) if json_output else format_measures(found))


def benchmark(
    name: tyro.conf.Positional[BenchmarkName | Literal["miniature"]],
    /,
    *,
    annotations: Path,
    videos: Path,
    model: Path,
    out: Path,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    num_frames: int | None = None,
    audio: bool = True,
    template: TemplateName | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    base: Path | None = None,
    judge_url: str | None = None,
    judge_model: str | None = None,
    json_output: JsonFlag = False,
) -> None:
    """Answer a benchmark's questions, greedily and in batches, and score the answers. Run again, it goes on.

    Example: vllama eval msvd_qa --annotations MSVD-QA/test_qa.json --videos YouTubeClips --model MODEL --out OUT

    Benchmarks, and what --annotations is (a file, or its folder); docs/evaluation.md says where to get them:

    {BENCHMARKS}
    - miniature (the world of the miniature model): no files, it renders its own clips; `vllama eval miniature --help`.

    Open questions are scored by exact match, and by a judge where there is one, which can also be asked later, by the
    same command; it is given the key in OPENAI_API_KEY. Captions need pip install 'vllama-jax[eval]'.

    Args:
        name: The benchmark.
        annotations: Its published annotations, a file or a folder.
        videos: The folder of its videos, in folders of their own or not.
        model: The model directory, or a run's.
        out: The folder for answers.jsonl and results.json.
        limit: Ask only so many questions, of each kind as many.
        batch_size: How many questions are answered at once.
        max_new_tokens: The longest answer, in tokens; 300, for captions 64 and for choices 32 unless given.
        num_frames: How many frames to take from a video; the model's own number unless given.
        audio: Leave the sound out.
        template: The prompt template; the model's own unless given.
        dtype: Of weights and computation; unless given, that of the answers in the folder, or else float32 on a CPU
            and bfloat16 elsewhere.
        quantize: Load the large weights in 8 or 4 bits.
        base: A run's base model, where that has moved.
        judge_url: An OpenAI-compatible endpoint, such as https://api.openai.com/v1, that scores open answers. Needs the
            extra `judge`.
        judge_model: The model to ask there.
        json_output: Print one JSON object, what results.json holds.
    """
    from vllama_jax.evaluate.answers import AnswerSettings
    from vllama_jax.evaluate.judge_client import make_judge
    from vllama_jax.evaluate.run import Evaluation, evaluate

    if name == "miniature":  # it takes other options, so that `select_command` has to see it first
        raise UsageError("the name comes before all options: `vllama eval miniature --seed 7`")
    if (judge_url is None) != (judge_model is None):
        raise UsageError("a judge needs both --judge-url and --judge-model")
    require_at_least(1, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, num_frames=num_frames)
    asked = Evaluation(
        benchmark=name,
        annotations=annotations,
        videos=videos,
        model=model,
        out=out,
        base=base,
        limit=limit,
        settings=AnswerSettings(
            max_new_tokens=max_new_tokens, num_frames=num_frames, audio=audio, template=template, batch_size=batch_size
        ),
        weights={"dtype": dtype, "quantize": quantize},
        judge=make_judge(judge_url, judge_model) if judge_url and judge_model else None,
    )
    with Display(quiet=json_output) as display:
        results = evaluate(asked, display.show_status)
        for line in _format_problems(results, videos):
            display.show_message(line)
    print(json.dumps(results) if json_output else "\n".join(_format_scores(results, out)))


benchmark.__doc__ = (benchmark.__doc__ or "").replace(
    "{BENCHMARKS}", "\n    ".join(f"- {name} ({found.title}): {found.files}." for name, found in BENCHMARKS.items())
)


def _format_problems(results: dict[str, Any], videos: Path) -> Iterator[str]:
    """What could not be answered or judged."""
    missing, unusable, unjudged = results["missing_videos"], results["unusable"], results["unjudged"]
    if missing["videos"]:
        first = ", ".join(missing["first"])
        yield f"{videos}: {missing['videos']} videos are missing, with {missing['questions']} questions; first {first}"
    for why in list(dict.fromkeys(unusable.values()))[:MAX_LISTED_FAILURES]:
        yield f"not answered: {why}"
    if len(unusable) > MAX_LISTED_FAILURES:
        yield f"not answered in all: {len(unusable)} questions; results.json has the reason of each"
    if unjudged["cases"]:
        yield f"not judged, until the same command asks again: {unjudged['cases']}; the first: {unjudged['first']}"


def _format_scores(results: dict[str, Any], out: Path) -> Iterator[str]:
    """The figures for people: percents, but for a judge's scores; published ones beside them."""
    published = results["published"] or {}
    for kind, scores in results["scores"].items():
        figures = [f"{name} {_format_percent(value)}" for name, value in scores.items() if isinstance(value, float)]
        if scores.get("no_choice"):
            figures.append(f"{scores['no_choice']} name no choice")
        before = published.get("accuracy", {}).get(kind)
        beside = f" (published {_format_percent(before)})" if before else ""
        yield f"{kind}: {', '.join([*figures, 'n ' + str(scores['n'])])}{beside}"
    for judge, aspects in results["judged"].items():
        for aspect, found in aspects.items():
            before = published.get("judged", {}).get(aspect)
            beside = f" (published {_format_judgement(before)})" if before else ""
            lacking = "" if found["n"] == found["of"] else f" of {found['of']}"
            dates = " to ".join(dict.fromkeys((found["from"], found["until"])))
            yield f"{aspect} by {judge}, {dates}: {_format_judgement(found)}, n {found['n']}{lacking}{beside}"
    asked = set().union(*results["judged"].values())
    for aspect, before in published.get("judged", {}).items():
        if aspect not in asked:
            why = "no score" if results["unjudged"]["cases"] else "not asked"
            yield f"{aspect} by a judge: {why} (published {_format_judgement(before)})"
    if published:
        yield f"published: {published['source']}"
    yield f"{out}: {results['answered']} of {results['questions']} questions answered"


def _format_judgement(found: dict[str, Any]) -> str:
    accuracy = f"{_format_percent(found['accuracy'])} / " if "accuracy" in found else ""
    return f"{accuracy}{found['score']:.2f}"


def _format_percent(value: float) -> str:
    return f"{100 * value:.1f}"
