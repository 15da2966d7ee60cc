"""Interactive chats: commands, options, interrupted answers, and lines of stdin."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import vllama_jax as vl
from vllama_jax.chat import Answer
from vllama_jax.cli import _interactive
from vllama_jax.cli._display import Display
from vllama_jax.cli._interactive import COMMANDS, Session, run_chat, run_line
from vllama_jax.cli.chat import _print_json as print_json
from vllama_jax.errors import ContextLengthError
from vllama_jax.media_tokens import PreparedMedia
from vllama_jax.text.prompts import Media, Turn, start_conversation

REPORT = vl.MediaReport("a.mp4", "video", 8, 4.0, "used")


class RepeatingChat:
    """Answers with the question in capitals, and keeps questions and files as `Chat` does."""

    def __init__(self):
        self.last, self.questions, self.files, self.options = None, [], (), {}

    def ask(self, question, **options):
        self.options = options
        if "long" in question:
            raise ContextLengthError("the prompt is too long")
        for word in question.upper().split():
            yield word + " "
        self.questions.append(question)
        self.last = Answer(question.upper(), [1], {})

    def undo(self):
        if not self.questions:
            raise vl.VllamaError("the conversation has no question that could be removed")
        return self.questions.pop()

    def reset(self):
        self.questions, self.files = [], ()


@pytest.fixture
def session() -> Session:
    chat = RepeatingChat()

    def add_media(opened, max_new_tokens):
        if "bad" in opened.name:
            raise vl.MediaError(f"{opened.name}: not a video")
        report = dataclasses.replace(REPORT, path=opened.name)
        chat.files = (*chat.files, report)
        return report

    return Session(
        chat=chat,
        display=Display(),
        model_name="MODEL",
        template="vicuna",
        open_media=lambda path: contextlib.nullcontext(SimpleNamespace(name=path)),
        add_media=add_media,
        generation=vl.GenerationConfig(),
    )


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ("What?", "What?"),
        ("  What?  \r\n", "What?"),
        ("two\nlines", "two\nlines"),
        (" /dev/null?", "/dev/null?"),
        ("//dev/null?", "/dev/null?"),
        ("1/2?", "1/2?"),
    ],
)
def test_a_line_is_a_question_unless_it_begins_with_one_slash(session, line, question):
    assert run_line(session, line)
    assert session.chat.questions == [question]


@pytest.mark.parametrize("line", ["", "\n", "  \t\r\n"])
def test_an_empty_line_is_ignored(session, line, capsys):
    assert run_line(session, line)
    assert session.chat.questions == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/", r"^/: not a command; /help lists the commands, // begins a question with a slash$"),
        ("/sav x", r"^/sav: not a command; did you mean '/save'\?; /help lists the commands"),
        ("/add", r"^/add takes FILE; /help lists the commands$"),
        ("/undo all", r"^/undo takes no argument; /help lists the commands$"),
        ("/exit now", r"^/exit takes no argument"),
        ("/add a\nWhat?", r"^/add: a command has one line; /help"),
        ("/set temprature 1", r"^temprature is not an option; did you mean 'temperature'\?$"),
        ("/set xyzzy 1", r"^xyzzy is not an option; /set lists the options$"),
        ("/set temperature warm", r"^/set\.temperature: 'warm' is not of type float$"),
        ("/set temperature -1", r"^/set: temperature must be at least 0, not -1\.0$"),
        ("/set temperature NaN", r"^/set\.temperature: 'NaN' is not of type float$"),
        ("/set top_k 1.5", r"^/set\.top_k: 1\.5 is not of type int$"),
        ("/set top_k 99999999999", r"^/set\.top_k: must be .* at most 2147483647, not 99999999999$"),
        ("/set top_p 2", r"^/set: top_p must be above 0 and at most 1, not 2\.0$"),
        ('/set top_p 0.5, "seed": 3', r"^/set\.top_p: .* is not of type float$"),
        ("/undo", r"^the conversation has no question that could be removed$"),
        ("/add bad.mp4", r"^bad\.mp4: not a video$"),
        ("/save /proc/x", r"^/proc/x: cannot be written \(.*\); choose another path$"),
        ("/save no/folder.json", r"^no/folder\.json: cannot be written \(No such file or directory\)"),
        ("/save a\0b", r"cannot be written \(.*null.*\)"),
    ],
)
def test_a_bad_command_is_one_line_and_changes_nothing(session, line, message):
    run_line(session, "What?")
    before = dataclasses.replace(session, transcript=[*session.transcript])
    if line == "/undo":
        run_line(session, line)
        before.transcript.clear()
    with pytest.raises(vl.VllamaError, match=message) as error:
        run_line(session, line)
    assert "\n" not in str(error.value)
    assert session == before


def test_options_are_set_and_listed(session, capsys):
    lines = ("/set temperature 0.7", "/set --max-new-tokens=12", "/set seed = 3", "/set seed", "What?")
    assert all(run_line(session, line) for line in lines)
    assert capsys.readouterr().err == "temperature 0.7\nmax_new_tokens 12\nseed 3\nseed 3\n"
    assert session.chat.options == dataclasses.asdict(session.generation)
    assert session.generation == vl.GenerationConfig(temperature=0.7, max_new_tokens=12, seed=3)
    for value, stop in (('["a b", "c"]', ("a b", "c")), ("END", ("END",)), ("[]", ())):
        run_line(session, f"/set stop {value}")
        assert session.generation.stop == stop
    capsys.readouterr()
    run_line(session, "/set")
    listed = dict(line.split() for line in capsys.readouterr().err.splitlines())
    assert listed == {name: json.dumps(value) for name, value in session.chat.options.items()}


def test_help_lists_every_command(session, capsys):
    run_line(session, "/help")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert max(map(len, lines)) <= 100


def test_a_conversation_is_saved_as_json_and_as_text(session, tmp_path, capsys):
    for line in ("/add a.mp4", "One?", "two\nlines", "/add b.mp4", "/undo", "/add c.mp4"):
        run_line(session, line)
    for name in ("chat.json", "chat.txt"):
        run_line(session, f"/save {tmp_path}/{name}")
    entries = [{"question": "One?", "answer": "ONE?"}]
    files = [{"file": dataclasses.asdict(dataclasses.replace(REPORT, path=f"{name}.mp4"))} for name in "abc"]
    saved = json.loads((tmp_path / "chat.json").read_text())
    expected = {"model": "MODEL", "template": "vicuna", "conversation": [files[0], *entries, *files[1:]]}
    assert saved == json.loads(json.dumps(expected))
    report = "8 frames of 4.0 s; audio used\n"
    assert (tmp_path / "chat.txt").read_text() == (f"a.mp4: {report}\n> One?\nONE?\n\nb.mp4: {report}\nc.mp4: {report}")
    with pytest.raises(vl.CheckpointError, match=r"chat\.txt: already exists; remove it or choose another path"):
        run_line(session, f"/save {tmp_path}/chat.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "chat.txt"]
    run_line(session, "/reset")
    assert (session.chat.questions, session.chat.files, session.transcript) == ([], (), [])
    assert [turn["question"] for turn in session.turns] == ["One?", "two\nlines"]


@pytest.mark.parametrize("typed", ["my clip.mp4", "'my clip.mp4'", '"my clip.mp4"', r"my\ clip.mp4"])
def test_a_path_with_spaces_may_be_quoted_as_a_terminal_does_when_a_file_is_dropped(session, typed):
    run_line(session, f"/add {typed}")
    assert session.chat.files[0].path == "my clip.mp4"


def test_paths_are_literal_if_such_a_file_exists(session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    Path("it's.mp4").touch()
    Path("a\\ b").touch()
    for typed in ("it's.mp4", "a\\ b", "~/x.mp4", "who's.mp4"):
        run_line(session, f"/add {typed}")
    assert [report.path for report in session.chat.files] == ["it's.mp4", "a\\ b", "/home/me/x.mp4", "who's.mp4"]


def test_an_interrupted_answer_is_not_in_the_conversation(session, capsys):
    words = session.chat.ask("one two three")
    session.chat.ask = lambda question, **_: (
        session.interrupted.set() or word if i == 1 else word for i, word in enumerate(words)
    )
    run_line(session, "/set seed 1")
    run_line(session, "one two three")
    printed = capsys.readouterr()
    assert printed.out == "ONE \n"
    assert printed.err.endswith("stopped; the conversation is as before this question\n")
    assert (session.transcript, session.turns) == ([], [])


def test_an_interrupted_add_adds_nothing(session, capsys):
    open_media = session.open_media
    session.open_media = lambda path: session.interrupted.set() or open_media(path)
    run_line(session, "/add a.mp4")
    assert capsys.readouterr().err == "stopped; the file is not added\n"
    assert (session.chat.files, session.transcript) == ((), [])


def test_lines_of_stdin_are_questions_and_commands(session, monkeypatch, capsys):
    lines = ["One?", "", "/add bad.mp4", "/nothing", "too long", "/add a.mp4", "Two?", "/exit", "Three?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    run_chat(session, "the hint")
    printed = capsys.readouterr()
    assert printed.out == "ONE? \nTWO? \n"
    errors = printed.err.splitlines()
    assert errors[0] == "the hint"
    assert errors[1:3] == [
        "vllama: bad.mp4: not a video",
        "vllama: /nothing: not a command; /help lists the commands, // begins a question with a slash",
    ]
    assert errors[3] == f"vllama: the prompt is too long; {_interactive.CONTEXT_ADVICE}"
    assert errors[4] == "a.mp4: 8 frames of 4.0 s; audio used"
    assert len(errors) == 5
    assert session.chat.questions == ["One?", "Two?"]


def test_stdin_that_is_not_text_is_an_error(session, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What\xff?\n"), encoding="utf-8"))
    with pytest.raises(vl.DataError, match=r"^stdin: not utf-8 text \(invalid start byte\)$"):
        run_chat(session, "")


def test_a_chat_without_stdin_ends(session, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    run_chat(session, "")


def test_undo_removes_a_turn_and_keeps_its_files():
    image, clip, audio = Media("image"), Media("video", True, (0.5,)), Media("audio")
    start = start_conversation("vicuna", True)
    first = start.add(image).ask("One?").answer("1")
    second = first.add(clip).ask("Two?").answer("2", ended_by_eos=True)
    assert second.undo() == first.add(clip)
    assert second.add(audio).undo() == first.add(clip).add(audio)
    assert second.undo().undo() == start.add(image).add(clip)
    assert first.ask("Two?").answer("2").undo() == first
    assert start.add(image).ask("One?").undo().turns == (Turn((image,)),)
    for empty in (start, start.add(image)):
        with pytest.raises(ValueError, match="there is no question to undo"):
            empty.undo()


def test_a_chat_lists_its_files_and_removes_its_last_question(monkeypatch):
    monkeypatch.setattr(vl.chat, "encode_media", lambda *_, **__: [])
    chat = vl.Chat(SimpleNamespace(config=vl.config.tiny(), tokenizer=None, network=None))
    with pytest.raises(vl.VllamaError, match="no question that could be removed"):
        chat.undo()
    for path, question in (("a.mp4", "One?"), ("b.mp4", "Two?")):
        chat.add_prepared(PreparedMedia(dataclasses.replace(REPORT, path=path), None, None))
        chat._conversation = chat._conversation.ask(question).answer("Yes.")
    assert [chat.undo(), chat.undo()] == ["Two?", "One?"]
    assert [report.path for report in chat.files] == ["a.mp4", "b.mp4"]
    assert chat._conversation.turns == (Turn((Media("video"),) * 2),)
    chat.reset()
    assert chat.files == chat._conversation.turns == ()


def test_json_of_a_chat_without_files_and_answers(capsys):
    print_json([], [], {})
    summary = json.loads(capsys.readouterr().out)
    assert (summary["report"], summary["reports"], summary["turns"]) == (None, [], [])
