"""The command `vllama eval`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from vllama_jax.checkpoints.shipped import MODEL_NAME
from vllama_jax.cli._display import Display, format_count
from vllama_jax.cli._usage import Command, JsonFlag, UsageError, require_at_least
from vllama_jax.evaluate.benchmarks import BENCHMARKS, BenchmarkName
from vllama_jax.text.templates import TemplateName

MAX_LISTED_FAILURES = 5  # reasons for unanswered questions


def select_command(arguments: list[str]) -> tuple[Command, str, list[str]]:
    """Return the command for the benchmark that comes first, the words that start the command, and its arguments."""
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
    """Measure a miniature on newly rendered clips, of combinations that were held out from its training.

    Example: vllama eval miniature --seed 7 --clips 200 --json

    Example: vllama eval miniature --measures motion motion_reversed sound_only

    docs/miniature.md describes the measures.

    Args:
        seed: The seed of the clips.
        clips: The number of files for each measure.
        model: The model directory, or hf://OWNER/NAME; by default the miniature of the package.
        audio_scale: The norm of the audio embeddings; by default the model's.
        measures: The names of the measures to take; by default all. Only the clips that they need are rendered.
        json_output: Print one JSON object: accuracy, n, chance and the accuracy's 95 % interval of each measure.
    """
    from vllama_jax.miniature.evaluate import check_arguments, evaluate, format_measures
    from vllama_jax.model import load

    require_at_least(0, seed=seed)
    require_at_least(1, clips=clips)
    check_arguments(seed, clips, measures)  # before a model is loaded
    with Display(quiet=json_output) as display:
        loaded = load(model or MODEL_NAME, audio_scale=audio_scale)
        results = evaluate(loaded, seed, clips, display.show_status, measures)
    print(json.dumps(results) if json_output else format_measures(results))


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
    """Answer the questions of a benchmark in batches, with greedy decoding, and score the answers.

    Run the same command again to resume a stopped evaluation.

    Example: vllama eval msvd_qa --annotations MSVD-QA/test_qa.json --videos YouTubeClips --model MODEL --out OUT

    Benchmarks and their annotation files for --annotations (the file or its directory); docs/evaluation.md lists where
    they are published:

    {BENCHMARKS}
    - miniature (clips of the miniature's world): no files, clips are rendered. See `vllama eval miniature --help`.

    Open questions are scored by exact match, and by a judge if one is given. To add a judge later, run the same command
    with --judge-url and --judge-model. The judge's key is read from OPENAI_API_KEY. Captions need the extra `eval`: pip
    install 'vllama-jax[eval]'.

    Args:
        name: The benchmark.
        annotations: The benchmark's published annotation file, or its directory.
        videos: The directory of the benchmark's videos, which may have subdirectories.
        model: The model or run directory, or hf://OWNER/NAME on the Hugging Face Hub.
        out: The directory for answers.jsonl and results.json.
        limit: Ask at most this many questions, the same number of each category.
        batch_size: The number of questions in a batch.
        max_new_tokens: The maximum length of an answer, in tokens; by default 300, 64 for captions and 32 for choices.
        num_frames: The number of frames to sample from a video; by default the model's.
        audio: Ignore the audio.
        template: The prompt template; by default the model's.
        dtype: The dtype of weights and computation; by default that of the saved answers, or else float32 on a CPU and
            bfloat16 elsewhere.
        quantize: Quantize the large weights when the model is loaded.
        base: The base model of a run, if it has moved.
        judge_url: An OpenAI-compatible endpoint that scores open answers, such as https://api.openai.com/v1. Needs the
            extra `judge`.
        judge_model: The name of the judge's model at the endpoint.
        json_output: Print the contents of results.json.
    """
    from vllama_jax.evaluate.answers import AnswerSettings
    from vllama_jax.evaluate.judge_client import make_judge
    from vllama_jax.evaluate.run import Evaluation, evaluate

    if name == "miniature":  # it has other options, which `select_command` chooses by the first argument
        raise UsageError("write the name before all options: `vllama eval miniature --seed 7`")
    if (judge_url is None) != (judge_model is None):
        raise UsageError("a judge needs both --judge-url and --judge-model")
    require_at_least(1, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, num_frames=num_frames)
    evaluation = Evaluation(
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
        results = evaluate(evaluation, display.show_status)
        for line in _format_problems(results, videos):
            display.show_message(line)
    print(json.dumps(results) if json_output else "\n".join(_format_scores(results, out)))


benchmark.__doc__ = (benchmark.__doc__ or "").replace(
    "{BENCHMARKS}", "\n    ".join(f"- {name} ({entry.title}): {entry.files}." for name, entry in BENCHMARKS.items())
)


def _format_problems(results: dict[str, Any], videos: Path) -> Iterator[str]:
    """Yield a line for missing videos, for each reason of unanswered questions, and for missing judgments."""
    missing, unusable, unjudged = results["missing_videos"], results["unusable"], results["unjudged"]
    if missing["videos"]:
        count, questions = format_count(missing["videos"], "video"), format_count(missing["questions"], "question")
        yield f"{videos}: {count} missing ({questions}), first {', '.join(missing['first'])}"
    for reason in list(dict.fromkeys(unusable.values()))[:MAX_LISTED_FAILURES]:
        yield f"not answered: {reason}"
    if len(unusable) > MAX_LISTED_FAILURES:
        yield f"not answered: {len(unusable)} questions in total; results.json lists the reasons"
    if unjudged["cases"]:
        count = format_count(unjudged["cases"], "answer")
        yield f"not judged: {count}, first: {unjudged['first']}; run the same command again to retry"


def _format_scores(results: dict[str, Any], out: Path) -> Iterator[str]:
    """Yield a line for each group of questions and each judge, with the published scores next to the measured ones.

    Fractions are shown as percentages, scores of judges as they are.
    """
    published = results["published"] or {}
    for group, scores in results["scores"].items():
        figures = [f"{name} {_format_percent(value)}" for name, value in scores.items() if isinstance(value, float)]
        if scores.get("no_choice"):
            figures.append(f"{scores['no_choice']} without a choice")
        reference = published.get("accuracy", {}).get(group)
        comparison = f" (published {_format_percent(reference)})" if reference else ""
        yield f"{group}: {', '.join([*figures, 'n ' + str(scores['n'])])}{comparison}"
    for judge, aspects in results["judged"].items():
        for aspect, scores in aspects.items():
            reference = published.get("judged", {}).get(aspect)
            comparison = f" (published {_format_judgment(reference)})" if reference else ""
            total = "" if scores["n"] == scores["of"] else f" of {scores['of']}"
            dates = " to ".join(dict.fromkeys((scores["from"], scores["until"])))
            yield f"{aspect} by {judge}, {dates}: {_format_judgment(scores)}, n {scores['n']}{total}{comparison}"
    judged_aspects = set().union(*results["judged"].values())
    for aspect, reference in published.get("judged", {}).items():
        if aspect not in judged_aspects:
            reason = "no score" if results["unjudged"]["cases"] else "not judged"
            yield f"{aspect} by a judge: {reason} (published {_format_judgment(reference)})"
    if published:
        yield f"published: {published['source']}"
    yield f"{out}: {results['answered']} of {results['questions']} questions answered"


def _format_judgment(scores: dict[str, Any]) -> str:
    accuracy = f"{_format_percent(scores['accuracy'])} / " if "accuracy" in scores else ""
    return f"{accuracy}{scores['score']:.2f}"


def _format_percent(value: float) -> str:
    return f"{100 * value:.1f}"
