"""Tokenizers: small ones with hand-written expectations, and the reference's golden ids."""

import io
import itertools
import json
import random
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from vllama_jax.errors import CheckpointError
from vllama_jax.text.tokenizer import check_vocabulary, load_tokenizer, tokenizer_files

SENTENCES = ["the dog sees the boat", "a dog and a boat", "###the dog ###a boat", "the dog", "a boat"] * 4
PLAIN_TOKEN = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
LLAMA_MAP = {f"{role}_token": {"content": f"<{text}>", **PLAIN_TOKEN} for role, text in (("bos", "s"), ("eos", "/s"))}


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="session")
def sentencepiece_model():
    """300 tokens: <unk> <s> </s>, 256 bytes, and words such as ▁the, ▁dog, ▁boat, ▁###."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def folder(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    return tmp_path


@pytest.fixture
def byte_level_folder(tmp_path):
    """A tokenizer like Llama 3's: bytes as letters, no unknown token, special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "do", "dog", "Ġdog"])}
    library = tokenizers.Tokenizer(models.BPE(vocab, [("d", "o"), ("do", "g"), ("Ġ", "dog")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])  # 259, 260
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}}
    write_json(tmp_path / "tokenizer_config.json", names)
    return tmp_path


@pytest.fixture
def byte_fallback_folder(tmp_path):
    """A tokenizer like LLaMA 2's tokenizer.json: ▁ for spaces, tokens <0x00> to <0xFF>."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abd", "▁a"]
    vocab = {name: i for i, name in enumerate(names)}
    library = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return tmp_path


def encode_to_tokens(tokenizer, text, **options):
    return tokenizer.tokens(tokenizer.encode(text, **options))


PIECES = [
    ("", "", ""),
    ("the dog", "▁the ▁dog", "the dog"),
    ("  dog", "▁ ▁ ▁dog", "  dog"),
    ("###the dog ###", "▁### the ▁dog ▁###", "###the dog ###"),
    ("\n", "▁ <0x0A>", "\n"),
    ("日", "▁ <0xE6> <0x97> <0xA5>", "日"),
    # text after a special token has its own ▁; white space next to it stays ...
    ("a</s>dog", "▁a </s> ▁dog", " a</s>dog"),
    ("a </s> dog", "▁a ▁ </s> ▁ ▁dog", " a </s> dog"),
    ("<s>a<unk>", "<s> ▁a <unk>", "<s> a<unk>"),
    # ... but not next to the media placeholder
    ("a <ImageHere> dog", "▁a <ImageHere> ▁dog", "a <ImageHere> dog"),
    ("<ImageHere> <ImageHere>", "<ImageHere> <ImageHere>", "<ImageHere> <ImageHere>"),
]


@pytest.mark.parametrize(("text", "expected", "decoded"), PIECES)
def test_tokenizer_round_trips_known_tokens(folder, text, expected, decoded):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.tokens(ids) == expected.split()
    assert tokenizer.encode(text, bos=True) == [1, *ids]
    assert tokenizer.decode(ids) == decoded


def test_special_tokens_as_plain_text(folder):
    tokenizer = load_tokenizer(folder)
    assert encode_to_tokens(tokenizer, "a</s>", special=False) == ["▁a", "<0x3C>", "<0x2F>", "s", "<0x3E>"]
    assert tokenizer.media_id not in tokenizer.encode("<ImageHere>", special=False)
    assert tokenizer.decode(tokenizer.encode("a <s><unk><ImageHere> b", special=False)) == "a <s><unk><ImageHere> b"


def test_special_tokens_are_skipped_on_request(folder):
    tokenizer = load_tokenizer(folder)
    ids = [0, 1, *tokenizer.encode("the dog"), tokenizer.media_id, 2, 999]
    assert tokenizer.decode(ids, skip_special=True) == "the dog"


def test_special_token_ids_of_llama(folder):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.pad_id == 0  # there is none, so the unknown token is used
    assert tokenizer.vocab_size == tokenizer.media_id == 300
    assert tokenizer.tokens([299, 300, 301]) == ["n", "<ImageHere>", ""]


def test_broken_surrogates_become_question_marks(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("a dog\udce9")) == "a dog?"


ADDED = [
    # files, tokens of "a [PAD] dog", pad_id, vocab_size
    (  # Vicuna v0: an entry without flags strips white space
        {"added_tokens": {"[PAD]": 300}, "special_tokens_map": {**LLAMA_MAP, "pad_token": "[PAD]"}},
        "▁a [PAD] ▁dog",
        300,
        301,
    ),
    (  # newer folders: flags and ids in tokenizer_config.json
        {
            "tokenizer_config": {
                "pad_token": "[PAD]",
                "added_tokens_decoder": {
                    "1": {"content": "<s>", "special": True},
                    "300": {"content": "[PAD]", "lstrip": False, "rstrip": True, "special": True},
                },
            }
        },
        "▁a ▁ [PAD] ▁dog",
        300,
        301,
    ),
    (  # only the names: added at the end, as in transformers
        {"tokenizer_config": {"pad_token": "[PAD]", "bos_token": "", "unk_token": None}},
        "▁a ▁ [PAD] ▁ ▁dog",
        300,
        301,
    ),
    (  # vicuna-7b-v1.5: padding is the unknown token
        {"special_tokens_map": {**LLAMA_MAP, "pad_token": "<unk>"}},
        None,
        0,
        300,
    ),
    ({"special_tokens_map": {"additional_special_tokens": ["[PAD]"]}}, "▁a [PAD] ▁dog", 0, 301),
]


@pytest.mark.parametrize(("files", "expected", "pad_id", "vocab_size"), ADDED)
def test_added_tokens_extend_the_vocabulary(folder, files, expected, pad_id, vocab_size):
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.media_id) == (pad_id, vocab_size, vocab_size)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    if expected:
        assert encode_to_tokens(tokenizer, "a [PAD] dog") == expected.split()
        assert tokenizer.decode([300], skip_special=True) == ""


def test_tokenizer_json_like_llama_3(byte_level_folder):
    tokenizer = load_tokenizer(byte_level_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (259, 260, None, 260)
    assert tokenizer.vocab_size == tokenizer.media_id == 261
    assert encode_to_tokens(tokenizer, "dog dog<|eot_id|>", bos=True) == [
        "<|begin_of_text|>",
        "dog",
        "Ġdog",
        "<|eot_id|>",
    ]
    plain = tokenizer.encode("<|eot_id|>", special=False)
    assert tokenizer.eos_id not in plain
    assert tokenizer.decode(plain) == "<|eot_id|>"
    ids = [259, *tokenizer.encode(" dog 🎂"), 260, 999]
    assert tokenizer.decode(ids) == "<|begin_of_text|> dog 🎂<|eot_id|>"
    assert tokenizer.decode(ids, skip_special=True) == " dog 🎂"
    assert tokenizer.tokens([261, 262]) == ["<ImageHere>", ""]
    assert tokenizer.decode(tokenizer.encode("dog <ImageHere>")) == "dog <ImageHere>"


def test_tokenizer_json_like_llama_2(byte_fallback_folder):
    tokenizer = load_tokenizer(byte_fallback_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, 0)
    assert encode_to_tokens(tokenizer, "a d</s>b日") == ["▁a", "▁", "d", "</s>", "▁", "b", "<0xE6>", "<0x97>", "<0xA5>"]
    assert tokenizer.decode(tokenizer.encode("a d日")) == "a d日"


def test_special_ids_come_from_the_config(byte_level_folder):
    (byte_level_folder / "tokenizer_config.json").unlink()
    write_json(byte_level_folder / "config.json", {"bos_token_id": 259, "eos_token_id": 1, "pad_token_id": -1})
    write_json(byte_level_folder / "generation_config.json", {"eos_token_id": [260, 258]})
    tokenizer = load_tokenizer(byte_level_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (259, 260, 260)


def test_tokenizer_model_has_priority_and_its_files_are_listed(folder):
    for name in ("added_tokens.json", "special_tokens_map.json", "config.json"):
        write_json(folder / name, {})
    (folder / "model.safetensors").write_bytes(b"weights")
    names = [path.name for path in tokenizer_files(folder)]
    assert names == ["tokenizer.model", "special_tokens_map.json", "added_tokens.json"]
    (folder / "tokenizer.json").write_text("broken")
    assert load_tokenizer(folder).vocab_size == 300
    assert "tokenizer.json" in [path.name for path in tokenizer_files(folder)]


def test_files_to_copy_beside_tokenizer_json(byte_level_folder):
    write_json(byte_level_folder / "config.json", {})
    names = [path.name for path in tokenizer_files(byte_level_folder)]
    assert names == ["tokenizer.json", "tokenizer_config.json", "config.json"]


BROKEN = [
    ({}, "no tokenizer in .* looked for tokenizer.model and tokenizer.json"),
    ({"tokenizer.model": ""}, "tokenizer.model: the file is empty"),
    ({"tokenizer.model": "version https://git-lfs.github.com/spec/v1\noid sha256:12"}, "git-lfs pointer"),
    ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "not a SentencePiece model .*tokenizer.json"),  # Llama 3's own format
    ({"tokenizer.json": "{"}, "tokenizer.json: not JSON"),
    ({"tokenizer.json": "{}"}, "tokenizer.json: not a tokenizer \\(no model"),
    ({"tokenizer.json": '{"model": {}}'}, "not a file of the tokenizers library"),
    ({"tokenizer.json": ""}, "tokenizer.json: the file is empty"),
]


@pytest.mark.parametrize(("files", "message"), BROKEN)
def test_invalid_folders_are_a_one_line_error(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


BROKEN_DECLARATIONS = [
    ("added_tokens.json", "{", "added_tokens.json: not JSON"),
    ("added_tokens.json", "[1]", "must contain a JSON object"),
    (
        "added_tokens.json",
        '{"[PAD]": "many"}',
        r"added_tokens.json: \[PAD\] must be an integer from 0 to .*, not 'many'",
    ),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"300": {}}}', "special tokens in .* cannot be read"),
    ("special_tokens_map.json", '{"bos_token": 1}', "special tokens in .* cannot be read"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN_DECLARATIONS)
def test_invalid_declarations_are_an_error(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_special_tokens_must_be_declared(byte_level_folder):
    (byte_level_folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="declare no bos and no eos token: add tokenizer"):
        load_tokenizer(byte_level_folder)


def test_a_vocabulary_beyond_the_embedding_table_is_an_error(folder):
    write_json(folder / "added_tokens.json", {"[PAD]": 300})
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, 301)
    check_vocabulary(tokenizer, 320)  # embedding tables are padded for speed
    with pytest.raises(CheckpointError, match=r"it has 301 tokens, .* 300 rows, so none for '\[PAD\]'; use the"):
        check_vocabulary(tokenizer, 300)


@pytest.mark.parametrize("kind", ["folder", "byte_level_folder", "byte_fallback_folder"])
def test_settled_text_is_final(kind, request):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab dog日本語é🎂\n👩‍🚀", k=10))
        any_ids = [rng.randrange(tokenizer.media_id + 2) for _ in range(10)]
        bytes_mostly = [rng.randrange(3, 259) for _ in range(10)]
        for ids, full in ((tokenizer.encode(text), True), (any_ids, False), (bytes_mostly, False)):
            text = tokenizer.decode(ids, skip_special=True)
            settled = [tokenizer.decode_stable_prefix(ids[:count]) for count in range(len(ids) + 1)]
            assert all(after.startswith(before) for before, after in itertools.pairwise([*settled, text]))
            assert not full or not any("\ufffd" in before for before in settled)


def test_incomplete_characters_are_not_settled(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("dog🎂")  # ▁dog and four bytes
    assert [tokenizer.decode_stable_prefix(ids[:count]) for count in range(6)] == [
        "",
        "dog",
        "dog",
        "dog",
        "dog",
        "dog🎂",
    ]


def test_importing_text_imports_nothing_heavy():
    heavy = "{'jax', 'sentencepiece', 'tokenizers', 'transformers', 'torch'}"
    program = f"import sys, vllama_jax.text.prompts; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["llama-bin", "llama-st"])
def test_token_ids_equal_the_golden_values(golden, name):
    tokenizer = load_tokenizer(golden / "weights" / name)
    for case in json.loads((golden / "chat/tokenizer_cases.json").read_text()):
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], bos=True) == case["ids_bos"]
        assert tokenizer.tokens(ids) == case["tokens"]
        assert tokenizer.decode(ids) == case["decoded"]


def test_segments_and_answers_equal_the_golden_values(golden):
    tokenizer = load_tokenizer(golden / "weights/llama-bin")
    for name, case in json.loads((golden / "chat/chat.json").read_text()).items():
        ids = [tokenizer.encode(text, bos=i == 0) for i, text in enumerate(case["segments"])]
        assert ids == case["segment_token_ids"], name
        assert tokenizer.decode(case["answer_tokens"]).strip() == case["answer_text"]


def test_vicuna_v0_equals_the_golden_values(golden):
    expected = json.loads((golden / "train/v0pad.json").read_text())["meta"]
    tokenizer = load_tokenizer(golden / "weights/llama-v0pad")
    assert (tokenizer.pad_id, tokenizer.media_id) == (expected["pad_id"], expected["image_id"])
    assert tokenizer.unk_id == expected["dataset_pad_id"]
    assert tokenizer.tokens([tokenizer.pad_id]) == [expected["pad_token"]]
    check_vocabulary(tokenizer, expected["embed_rows"])


@pytest.mark.parametrize("order", [("<a>", "<a>b"), ("<a>b", "<a>")])
def test_the_longest_matching_special_token_is_found(folder, order):
    write_json(folder / "added_tokens.json", {token: 300 + number for number, token in enumerate(order)})
    ids = {token: 300 + number for number, token in enumerate(order)}
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<a>b") == [ids["<a>b"]]
    assert tokenizer.encode("<a><a>b<a>") == [ids["<a>"], ids["<a>b"], ids["<a>"]]
