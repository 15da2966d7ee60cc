"""Scores of predictions, computed locally and by a judge."""

import base64
import html
import json
import socketserver
import sys
import threading
import urllib.parse

import eval_fixtures
import pytest
from eval_fixtures import make_completion

import vllama_jax as vl
from vllama_jax.evaluate import metrics
from vllama_jax.evaluate.judge_answers import judge_answers, summarize_judgments
from vllama_jax.evaluate.judge_client import ASPECTS, Judge, JudgeError, make_judge, parse_reply
from vllama_jax.evaluate.questions import make_caption_question, make_choice_question, make_open_question
from vllama_jax.io.jsonl import JsonLinesFile


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def connect_judge(judge: eval_fixtures.FakeJudge, **fields) -> Judge:
    return Judge(judge.url, "fake", timeout=5, **fields)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "contained"),
    [
        ("A dog.", "dog", True, True),
        ("Two", "2", True, True),
        ("The dog runs on the beach.", "dog", False, True),
        ("It is an ice-cream", "ice cream", False, True),
        ("yes, he is", "yes", False, True),
        ("1,000", "1000", True, True),
        ("a hotdog", "dog", False, False),
        ("man's best friend", "mans best friend", True, True),
        ("", "dog", False, False),
        ("35", "3.5", False, False),
        ("10.30", "1030", False, False),
        ("3,5", "35", False, False),
        ("1,2,3", "123", False, False),
        ("3,000", "3000", True, True),
        ("1,234,567.5", "1234567.5", True, True),
        ("It costs 3.5.", "3.5", False, True),
        ("It costs 3.5", "3", False, False),
        (".5", ".5", True, True),
        ("-5", "5", False, False),
        ("\u22125 degrees", "-5", False, True),
        ("pages 2-5", "pages 2 5", True, True),
        ("1/2", "12", False, False),
        ("10²", "102", False, False),
        ("３.５", "3.5", True, True),
        ("٣", "3", True, True),
        ("ＤＯＧ", "dog", True, True),
        ("", "a", False, False),
        ("the", "a", False, False),
        ("A", "a", True, True),
        ("...", "a", False, False),
        ("?", "!", False, False),
        ("?", "?", True, True),
        ("it's", "it’s", True, True),
        ("don't", "don`t", True, True),
        ("ice\u2011cream", "ice cream", True, True),
        ("caf\u00e9", "cafe\u0301", True, True),
        ("so\u00adft\u200b", "soft", True, True),
        ("STRASSE", "straße", True, True),
        ("“dog”!", "dog", True, True),
        ("一只狗。", "一只狗", True, True),
        ("这是一只狗", "一只狗", False, True),
        ("猫", "狗", False, False),
        ("€5", "5", True, True),
        ("dog", "dogs", False, False),
    ],
)
def test_exact_match_and_contains(answer, reference, exact, contained):
    assert metrics.exact_match(answer, ["nothing", reference]) == exact
    assert metrics.contains(answer, ["nothing", reference]) == contained


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Answer: (B) the blue one", "B"),
        ("Answer: (B", "B"),
        ("Answer: (B. the blue one", "B"),
        ("Answer: (B: blue", "B"),
        ("Answer: (B, because", "B"),
        ("Answer: (B\nBecause", "B"),
        ("Answer: (A man throws the red ball", "C"),
        ("Answer: (A man", None),
        ("B", "B"),
        ("b", None),
        ("C. the red ball", "C"),
        ("The answer is A because", "A"),
        ("A man throws the red ball", "C"),
        ("Answer: (the blue one", "B"),
        ("red ball or blue one", None),
        ("(D)", None),
        ("It is a ball", "A"),
        ("", None),
    ],
)
def test_the_letter_of_an_answer_is_found(answer, letter):
    assert metrics.find_choice_letter(answer, ("ball", "blue one", "red ball")) == letter


FOUR = ("running", "a dog", "jumping high", "sleeping")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Answer: D", "D"),
        ("answer: d", "D"),
        ("ANSWER IS D", "D"),
        ("Answer:\n\nD.", "D"),
        ("The correct answer is: (C)", "C"),
        ("The answer is option B.", "B"),
        ('{"answer": "C"}', "C"),
        ("答案：C", "C"),
        ("答案是C。", "C"),
        ("Option B", "B"),
        ("I would choose option (c).", "C"),
        ("I choose D.", "D"),
        ("It must be D", "D"),
        ("**B**", "B"),
        ("**Answer:** B", "B"),
        ("The answer is **(B)**.", "B"),
        ("`B`", "B"),
        ("b)", "B"),
        ("(b)", "B"),
        ("d. sleeping", "D"),
        ("[C]", "C"),
        ("（C）", "C"),
        ("Ｃ", "C"),
        ("\\boxed{C}", "C"),
        ("$\\boxed{\\text{C}}$", "C"),
        ("So (A) or (B), thus \\boxed{(D) sleeping}", "D"),
        ("I considered (A), but it is incorrect. Final answer: D.", "D"),
        ("Answer: (I considered (A), but it is incorrect. Final answer: D.", "D"),
        ("Answer: B. No: the answer is C.", "C"),
        ("The answer is not A. Option B is wrong, option C", "C"),
        ("Not (A), it shows (D) here", "D"),
        ("(A) is incorrect, (B) is the one", "B"),
        ("It could be (A) or (B)", None),
        ("The answer is A or B", None),
        ("A dog", "B"),
        ("A cat", None),
        ("Answer: A cat", None),
        ("The answer is a cat", None),
        ("The answer is a dog.", "B"),
        ("I think so", None),
        ("The answer is A, because it runs", "A"),
        ("A", "A"),
        ("Answer: (A", "A"),
        ("Answer: E", None),
        ("Be careful", None),
        ("Cats sleep", None),
        ("The man is jumping high", "C"),
    ],
)
def test_letters_as_models_write_them(answer, letter):
    assert metrics.find_choice_letter(answer, FOUR) == letter


@pytest.mark.parametrize(
    ("answer", "choices", "letter"),
    [
        ("Answer: B flat", ("C major", "D minor", "A minor", "B flat"), "D"),
        ("A minor", ("C major", "D minor", "A minor", "B flat"), "C"),
        ("2", ("3", "2", "1"), "B"),
        ("3.5", ("35", "3.5"), "B"),
        ("Answer: (-5", ("5", "-5"), "B"),
        ("B", ("B", "A"), "B"),
        ("the answer is yes", ("no", "yes"), "B"),
        ("I", tuple("123456789"), "I"),
        ("I see it", tuple("123456789"), None),
        ("一只狗。", ("一只猫", "一只狗"), "B"),
    ],
)
def test_letters_and_texts_of_choices(answer, choices, letter):
    assert metrics.find_choice_letter(answer, choices) == letter


def test_captions_are_tokenized_as_coco_does():
    assert metrics.tokenize_caption("a man\u2019s dog doesn\u2019t") == "a man 's dog does n't"
    assert metrics.tokenize_caption("A man's dog doesn't run, (well) 3.5 m!") == "a man 's dog does n't run well 3.5 m"


def test_captions_are_scored_as_coco_does():
    references = {"a": ["a red ball crosses a meadow", "the ball rolls"], "b": ["a bell rings"], "c": ["a man sings"]}
    same = metrics.score_captions({key: texts[0] for key, texts in references.items()}, references)
    assert same["bleu_4"] == pytest.approx(1.0, abs=1e-3)
    assert same["rouge_l"] == pytest.approx(1.0)
    other = metrics.score_captions({"a": "A ball crosses.", "b": "It rings!", "c": "Nothing"}, references)
    assert 0 < other["cider"] < same["cider"]
    assert 0 < other["bleu_1"] < 1
    assert list(same) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"]


def test_a_missing_library_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    question = make_caption_question("a dog", id="a", names=("a",))
    with pytest.raises(vl.ConfigError, match=r"is not installed: pip install 'vllama-jax\[eval\]'"):
        metrics.check_libraries([question])
    metrics.check_libraries([make_open_question("what?", "dog", id="b", names=("a",))])


def test_scores_are_reported_by_category():
    fields = {"names": ("a",)}
    questions = [
        make_choice_question("q", ["x", "y"], "x", id="1", categories=("one",), **fields),
        make_choice_question("q", ["x", "y", "z", "w"], "w", id="2", categories=("two",), **fields),
        make_open_question("q", "dog", id="3", categories=("one",), **fields),
        make_open_question("q", "dog", id="4", categories=("one",), **fields),
    ]
    scores = metrics.score(questions, {"1": "Answer: (", "2": "Answer: (D)", "3": "a dog"})
    assert list(scores) == ["all", "one", "two"]
    assert scores["all"] == {
        "n": 3,
        "accuracy": 0.5,
        "chance": 0.375,
        "no_choice": 1,
        "exact_match": 1.0,
        "contains": 1.0,
    }
    assert scores["two"] == {"n": 1, "accuracy": 1.0, "chance": 0.25, "no_choice": 0}


@pytest.mark.parametrize(
    ("reply", "aspect", "found"),
    [
        ('{"correct": "yes", "score": 4}', "match", {"score": 4, "correct": True}),
        ('Sure:\n```json\n{"correct": "No", "score": 0}\n```', "match", {"score": 0, "correct": False}),
        ('{"score": 4.5}', "detail", {"score": 4.5}),
        ('{"score": 4}', "match", None),
        ('{"score": 9}', "detail", None),
        ('{"score": "4"}', "detail", None),
        ('{"score": true}', "detail", None),
        ("I would say 4.", "detail", None),
        ("{'pred': 'yes', 'score': 4}", "match", {"score": 4, "correct": True}),
        ("{'score', 4} {", "detail", None),
        ("{[]: 4}", "detail", None),
    ],
)
def test_scores_are_parsed_from_replies(reply, aspect, found):
    assert parse_reply(reply, aspect) == found


def test_a_judge_receives_question_answer_and_prediction():
    text = '{"correct": "yes", "score": 5}'
    with eval_fixtures.serve_judge(lambda number, body: (200, make_completion(text)[1] | {"model": "fake-2"})) as fake:
        found = connect_judge(fake, key="sk-secret").ask("match", ["What is it?"], "a dog", ["A hound."])
    assert found == {"score": 5, "correct": True, "reply": text, "model": "fake-2"}
    (body,) = fake.bodies
    assert (fake.paths, fake.keys) == (["/v1/chat/completions"], ["Bearer sk-secret"])
    assert (body["model"], body["temperature"]) == ("fake", 0)
    prompt = body["messages"][1]["content"]
    assert all(text in prompt for text in ("What is it?", "a dog", "A hound.", '"correct"'))
    assert "sk-secret" not in repr(connect_judge(fake, key="sk-secret"))
    assert set(ASPECTS) == {"match", "correctness", "detail", "context", "temporal", "consistency"}


def test_a_judge_is_asked_again_after_failures_and_replies_without_a_score():
    replies = [
        (503, {}),
        (429, {"error": {"message": "slow down"}}),
        make_completion("hm"),
        make_completion('{"score": 2}'),
    ]
    with eval_fixtures.serve_judge(lambda number, body: replies[number]) as fake:
        assert connect_judge(fake).ask("detail", ["q"], "r", ["a"])["score"] == 2
    with eval_fixtures.serve_judge(lambda number, body: make_completion("hm")) as fake:
        assert connect_judge(fake).ask("detail", ["q"], "r", ["a"]) == "hm"
        assert len(fake.bodies) == 3


def test_a_model_without_temperature():
    def reply(number, body):
        refusal = {"error": {"message": "Unsupported value: 'temperature' does not support 0"}}
        return (503, {}) if number < 2 else (400, refusal) if "temperature" in body else make_completion('{"score": 3}')

    with eval_fixtures.serve_judge(reply) as fake:
        judge = connect_judge(fake)
        assert [judge.ask("detail", ["q"], "r", ["a"])["score"] for _ in range(2)] == [3, 3]
        assert ["temperature" in body for body in fake.bodies] == [True] * 3 + [False] * 2, "it is refused once"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "bad key sk-secret"}}), r"refused the request \(HTTP 401: bad key …\); set "),
        (
            (404, {"error": "no such model"}),
            r"\(HTTP 404: no such model\); check --judge-url and --judge-model",
        ),
        ((307, {}), r"refused the request \(HTTP 307: Temporary Redirect\)"),
        ((500, {}), r"cannot be reached \(HTTP 500: Internal Server Error\); check --judge-url"),
        ((200, {"hello": 1}), r"cannot be reached \(its reply is not a chat completion\)"),
    ],
)
def test_a_judge_that_refuses_requests_is_reported(reply, message):
    with (
        eval_fixtures.serve_judge(lambda number, body: reply) as fake,
        pytest.raises(JudgeError, match=message) as error,
    ):
        connect_judge(fake, key="sk-secret").ask("detail", ["q"], "r", ["a"])
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"no HTTP for sk-secret\r\n\r\n", r"cannot be reached \(illegal status line.*no HTTP for …"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", r"cannot be reached \(peer closed connection without"),
    ],
)
def test_invalid_http_replies_are_reported(sent, message):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.request.sendall(sent)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
        judge = Judge(f"http://127.0.0.1:{server.server_address[1]}", "fake", key="sk-secret")
        with pytest.raises(JudgeError, match=message):
            judge.ask("detail", ["q"], "r", ["a"])
        server.shutdown()


KEY = "sk-Sec/ret+4&5"


@pytest.mark.parametrize(
    "leak",
    [
        "Bearer {key}",
        "{quoted} and {quoted_all}",
        "{hexadecimal}",
        "{base64}",
        "{url_base64}",
        "{basic}",
        "{authorization}",
        "{upper}",
        "<pre>{html}</pre>",
    ],
)
def test_a_key_in_a_reply_is_never_written(leak, tmp_path):
    """The key may be in a reply with or without a score, in the name of the model or on an error page, also in part."""

    def base64_of(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    forms = {
        "key": KEY,
        "quoted": urllib.parse.quote(KEY),
        "quoted_all": urllib.parse.quote(KEY, safe=""),
        "hexadecimal": KEY.encode().hex(),
        "base64": base64_of(KEY),
        "url_base64": base64.urlsafe_b64encode(KEY.encode()).decode(),
        "basic": base64_of(f"user:{KEY}"),
        "authorization": base64_of(f"Bearer {KEY}"),
        "upper": KEY.upper(),
        "html": html.escape(KEY),
    }
    leaked = leak.format(**forms)
    replies = {
        "scored": (200, make_completion(f'You sent {leaked}. {{"correct": "no", "score": 1}}')[1] | {"model": leaked}),
        "rambling": make_completion(f"You sent {leaked}."),
        "refused": (400, {"error": {"message": f"bad {leaked}"}}),
    }
    questions = [make_open_question(name, "dog", id=name, names=("a",)) for name in replies]
    journal = JsonLinesFile(tmp_path / "judgements.jsonl")
    with eval_fixtures.serve_judge(
        lambda number, body: next(reply for name, reply in replies.items() if name in body["messages"][1]["content"])
    ) as fake:
        lacking = judge_answers(
            connect_judge(fake, key=KEY), questions, dict.fromkeys(replies, "it"), journal, lambda text: None
        )
    assert len(lacking) == 2
    (line,) = journal.read()
    assert (line["score"], "You sent " in line["reply"], "…" in line["model"]) == (1, True, True)
    everything = json.dumps([lacking, line]) + (tmp_path / "judgements.jsonl").read_text()
    for form in forms.values():
        key_parts = [form[start : start + 12] for start in range(max(len(form) - 11, 1))]
        assert not [part for part in key_parts if len(part) >= 8 and part.lower() in everything.lower()], form


def test_scores_are_read_whatever_the_key_is():
    """Short keys also occur within words, and in the JSON of a reply."""
    with eval_fixtures.serve_judge(lambda number, body: make_completion('{"correct": "yes", "score": 5}')) as fake:
        found = connect_judge(fake, key="e").ask("match", ["q"], "r", ["a"])
    assert (found["score"], found["correct"], found["reply"]) == (5, True, '{"corr…ct": "y…s", "scor…": 5}')
    assert connect_judge(fake).redact({"any": ["thing", 3, None]}) == {"any": ["thing", 3, None]}


def test_a_key_with_a_line_break_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    assert make_judge("http://x", "m").key == "sk-secret"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(vl.ConfigError, match="OPENAI_API_KEY has a line break") as error:
        make_judge("http://x", "m")
    assert "secret" not in str(error.value)


def test_an_unreachable_judge_is_reported():
    with pytest.raises(
        JudgeError, match=r"http://127.0.0.1:9/v1/chat/completions: the judge cannot be reached \(.*refus"
    ):
        Judge("http://127.0.0.1:9/v1/", "fake").ask("detail", ["q"], "r", ["a"])
    with pytest.raises(vl.ConfigError, match=r"--judge-url http://127.0.0.1:80a/v1: .*\(Invalid port: '80a'\)"):
        Judge("http://127.0.0.1:80a/v1", "fake")
    with pytest.raises(vl.ConfigError, match="--judge-url must begin with http:// or https://, not 'localhost'"):
        make_judge("localhost", "m")


def test_judging_resumes_and_counts_missing_replies(tmp_path):
    questions = [
        make_open_question("What?", "dog", id="1", names=("a",)),
        make_open_question("Who?", "man", id="2", names=("a",)),
        make_open_question("One way?", "x", ("consistency",), id="c-1", names=("a",), group="c"),
        make_open_question("Other way?", "x", ("consistency",), id="c-2", names=("a",), group="c"),
        make_open_question("Unanswered?", "x", id="3", names=("a",)),
    ]
    answers = {"1": "dog", "2": "woman", "c-1": "this", "c-2": "that"}
    journal = JsonLinesFile(tmp_path / "judgements.jsonl")

    def reply(number, body):
        text = body["messages"][1]["content"]
        if "consistency" in text or "two ways" in text:
            assert all(part in text for part in ("One way?", "Other way?", "this", "that"))
            return make_completion('{"score": 1}')
        return make_completion('{"correct": "yes", "score": 5}' if "dog" in text else '{"correct": "no", "score": 0}')

    with eval_fixtures.serve_judge(reply) as fake:
        judge_answers(connect_judge(fake), questions[:1], answers, journal, lambda text: None)
        judge_answers(connect_judge(fake), questions, answers, journal, lambda text: None)
        assert len(fake.bodies) == 3, "what was judged is not judged again"
    with eval_fixtures.serve_judge(lambda number, body: make_completion('{"correct": "no", "score": 1}')) as other:
        judge_answers(connect_judge(other), questions[:1], answers, journal, lambda text: None)
        assert len(other.bodies) == 1, "the same name at another URL is another judge"
    both = summarize_judgments(questions, journal.read())
    assert both[f"fake at {other.url}"]["match"]["n"] == 1
    found = both[f"fake at {fake.url}"]
    date = found["match"]["from"]
    assert found["match"] == {"n": 2, "of": 3, "score": 2.5, "accuracy": 0.5, "from": date, "until": date}
    assert (found["consistency"]["score"], found["consistency"]["of"]) == (1, 1)


def test_scores_have_the_first_and_last_date_of_judging():
    questions = [make_open_question("What?", "dog", id=key, names=("a",)) for key in "123"]
    line = {"aspect": "match", "judge": "fake", "url": "http://x", "correct": True}
    days = {"1": ("2026-02-10", 5), "2": ("2025-12-31", 2), "3": ("2026-01-01", 2)}
    lines = [{**line, "id": key, "date": date, "score": score} for key, (date, score) in days.items()]
    found = summarize_judgments(questions, lines)["fake at http://x"]["match"]
    assert found == {"n": 3, "of": 3, "score": 3.0, "accuracy": 1.0, "from": "2025-12-31", "until": "2026-02-10"}


def test_refused_prompts_and_replies_without_a_score_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("vllama_jax.evaluate.judge_answers.MAX_CONCURRENT_REQUESTS", 2)
    questions = [make_open_question("What?", name, id=name, names=("a",)) for name in ("gun", "dog", "cat")]
    answers = {question.id: "it" for question in questions}
    journal = JsonLinesFile(tmp_path / "judgements.jsonl")
    filtered = (400, {"error": {"message": "filtered"}})

    def reply(number, body):
        text = body["messages"][1]["content"]
        return (
            filtered if "gun" in text else make_completion("hm" if "cat" in text else '{"correct": "no", "score": 1}')
        )

    with eval_fixtures.serve_judge(reply) as fake:
        refused, unread = judge_answers(connect_judge(fake), questions, answers, journal, lambda text: None)
        assert "the judge refused the request (HTTP 400: filtered)" in refused
        assert unread == "fake gave no score but 'hm'"
        assert len(judge_answers(connect_judge(fake), questions, answers, journal, lambda text: None)) == 2
    assert [line["id"] for line in journal.read()] == ["dog"]
    with eval_fixtures.serve_judge(lambda number, body: filtered) as fake, pytest.raises(JudgeError, match="filtered"):
        judge_answers(connect_judge(fake), questions, answers, journal, lambda text: None)
