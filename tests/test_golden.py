"""All intermediate values, from frames and mel to tokens, compared with the original's.

Needs ../shared/golden. Encoders, embeddings and logits agree within 2e-5 of the reference's largest value; ids and
generated tokens are identical.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN_HEADS

from vllama_jax import convert
from vllama_jax.chat import Chat
from vllama_jax.config import GenerationConfig
from vllama_jax.generate import EmbeddedPrompt, generate
from vllama_jax.generate.choose import warp_logits
from vllama_jax.media_tokens import prepare_media
from vllama_jax.model import Model, load
from vllama_jax.nn.video_llama import splice
from vllama_jax.text import prompts

TOLERANCE = 2e-5
VIDEOS = ("birthday", "boat", "dog_barking", "silence_girl")
SOUNDS = ("boat", "dog_barking")
CASES = [
    f"{template}_{case}_turn{turn}"
    for template in ("vicuna", "llama_v2")
    for case in ("audio_video", "video_no_audio_stream", "video_only", "image")
    for turn in (1, 2)
]


@pytest.fixture(scope="module")
def model(golden_model: Path) -> Model:
    return load(golden_model)


@pytest.fixture(scope="module")
def chats(golden: Path) -> dict:
    return json.loads((golden / "chat/chat.json").read_text())


def assert_close(ours, reference: np.ndarray) -> None:
    ours = np.asarray(ours).reshape(reference.shape)
    assert np.abs(ours - reference).max() <= TOLERANCE * np.abs(reference).max()


def frames_of(golden: Path, name: str) -> np.ndarray:
    """Read normalized frames [1, t, h, w, 3]."""
    if name == "dog_image":
        return np.load(golden / "media/dog_image.npz")["image_norm_chw"].transpose(1, 2, 0)[None, None]
    return np.load(golden / f"media/{name}_video.npz")["video_norm_cthw"].transpose(1, 2, 3, 0)[None]


@pytest.mark.parametrize("name", [*VIDEOS, "dog_image"])
def test_vision_branch_equals_the_originals_values(golden, model, name):
    reference = np.load(golden / f"encoders/{name if name == 'dog_image' else name + '_video'}.npz")

    @jax.jit
    def run(network, frames):
        visible = network.vit(frames[0])
        normed = network.ln_vision(visible)
        return (
            visible,
            normed,
            network.image_qformer(normed),
            network.encode_frames(frames),
            network.encode_video(frames),
        )

    visible, normed, queries, features, tokens = run(model.network, frames_of(golden, name))
    assert_close(visible, reference["vit_out"])
    assert_close(normed, reference["ln_vision"])
    assert_close(queries, reference["qformer_out"])
    assert_close(features, reference["qformer_out"])
    assert_close(tokens, reference["video_tokens"])


@pytest.mark.parametrize("name", SOUNDS)
def test_audio_branch_equals_the_originals_values(golden, model, name):
    reference = np.load(golden / f"encoders/{name}_audio.npz")
    mel = np.load(golden / f"media/{name}_audio.npz")["mel"][None, :, 0]
    run = jax.jit(lambda network, mel: (network.imagebind.audio(mel[0]), network.encode_audio(mel)))
    features, tokens = run(model.network, mel)
    assert_close(features, reference["imagebind_finalout"])
    assert_close(tokens, reference["audio_tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["birthday", "dog_image"])
def test_audio_branch_on_images_equals_the_originals_values(golden, model, name):
    reference = np.load(golden / f"encoders/{name}_imagebind_vision.npz")
    run = jax.jit(lambda network, x: (network.imagebind.vision(x[0]), network.encode_audio_from_vision(x)))
    features, tokens = run(model.network, frames_of(golden, name))
    assert_close(features, reference["imagebind_finalout"])
    assert_close(tokens, reference["audio_tokens"])


@pytest.mark.slow
def test_batches_and_fewer_frames_equal_the_originals_values(golden, model):
    reference = np.load(golden / "extra/variants.npz")
    birthday, boat = frames_of(golden, "birthday"), frames_of(golden, "boat")
    run = jax.jit(lambda network, x: network.encode_video(x))
    both = run(model.network, np.concatenate([birthday, boat]))
    assert_close(both, reference["batch2_birthday_boat_video_tokens"])
    assert_close(run(model.network, boat[:, :4]), reference["boat_first4frames_video_tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_prompt_embeddings_and_logits_equal_the_originals(golden, model, chats, case):
    """From the turns of a conversation and golden media tokens to the logits of all positions."""
    chat, reference = chats[case], np.load(golden / f"chat/{case}.npz")
    tokens = list(_media_tokens(golden, case))
    encoded = prompts.encode_conversation(_conversation(chat, case, golden), model.tokenizer, [len(t) for t in tokens])
    assert len(encoded.ids) == chat["context_len"]
    run = jax.jit(lambda network, x: network(x, jnp.ones(x.shape[:2], bool)))
    embedded = splice(model.network.embed(encoded.ids[None]), encoded.is_media[None], np.concatenate(tokens)[None])
    assert_close(embedded, reference["mixed_embeds"])
    logits = np.asarray(run(model.network, embedded))[0]
    assert_close(logits[-len(reference["logits"]) :], reference["logits"])


def _media_tokens(golden: Path, case: str) -> Iterator[np.ndarray]:
    if "audio_video" in case:
        yield np.load(golden / "encoders/dog_barking_audio.npz")["audio_tokens"][0]
        yield np.load(golden / "encoders/dog_barking_video.npz")["video_tokens"][0]
    elif "image" in case:
        yield np.load(golden / "encoders/dog_image.npz")["video_tokens"][0]
    else:
        name = "birthday" if "no_audio" in case else "silence_girl"
        yield np.load(golden / f"encoders/{name}_video.npz")["video_tokens"][0]


def _conversation(chat: dict, case: str, golden: Path) -> prompts.Conversation:
    """Return a case's conversation: its file and first question, and in second turns the answer and next question."""
    found = json.loads((golden / "media/media.json").read_text()).get(chat["media"].removesuffix(".mp4"), {})
    seconds = tuple(index / found["fps"] for index in found["indices"]) if "indices" in found else ()
    media = prompts.Media("image" if "image" in case else "video", "audio_video" in case, seconds)
    template = {"vicuna": "vicuna", "llama_v2": "llama_2"}[chat["template"]]
    conversation = prompts.start_conversation(template, audio_branch=True, system=chat["conv_system_at_prompt"])
    conversation = conversation.add(media).ask(_question(chat["messages"][0][1]))
    if case.endswith("turn2"):
        conversation = conversation.answer(chat["messages"][1][1]).ask(chat["messages"][2][1])
    assert prompts.render(conversation) == chat["prompt"]
    return conversation


def _question(message: str) -> str:
    """Return the user's own words in a first message, which follow the sentences about media."""
    ends = ("seen and heard. ", "seconds.  ", "</Image>  ")
    return next(message.split(end)[-1] for end in ends if end in message)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("greedy", {}),
        pytest.param("beam3", {"num_beams": 3}, marks=pytest.mark.slow),
        ("reppen12", {"repetition_penalty": 1.2}),
    ],
)
def test_generated_tokens_are_the_originals(golden, model, case, kind, options):
    reference = np.load(golden / f"chat/{case}.npz")
    expected = reference[f"{kind}_sequences"][0].tolist()
    assert [1, *_generate(model, reference["mixed_embeds"][0], eos=2, **options)] == expected


def _generate(model, embeddings: np.ndarray, *, eos: int, stops=(), **options) -> list[int]:
    """Generate 20 tokens after stored embeddings, all of which are passed as media."""
    n = len(embeddings)
    prompt = EmbeddedPrompt(np.zeros(n, np.int32), np.ones(n, bool), jnp.asarray(embeddings))
    config = GenerationConfig(max_new_tokens=20, **options)
    batches = generate(model.network.llama, [prompt], config, bos=1, eos=eos, stops=stops)
    return [*itertools.chain(*(batch[0] for batch in batches))]


@pytest.mark.slow
def test_generation_that_ends_early_equals_the_originals(golden, model):
    """EOS (another id stands for it), stop sequences, length penalties and beams; `minlen` is not supported."""
    runs = json.loads((golden / "extra/generation_eos_stop.json").read_text())
    for case, group in runs.items():
        embeddings = np.load(golden / f"chat/{case}.npz")["mixed_embeds"][0]
        for name, run in group["runs"].items():
            if "minlen" in name:
                continue
            options = {
                "num_beams": run.get("num_beams", 3 if name.endswith("beams3") else 1),
                "length_penalty": float(run.get("length_penalty", 1)),
                "repetition_penalty": run.get("repetition_penalty", 1.0),
            }
            stops = run.get("stops", ())
            got = _generate(model, embeddings, eos=2 if stops else group["eos_token_id"], stops=stops, **options)
            assert [1, *got] == run["sequence"], (case, name)


@pytest.mark.slow
def test_sampling_probabilities_are_the_originals(golden):
    reference = np.load(golden / "chat/sampling_warpers.npz")
    for name in ("T1.0_P0.9", "T0.7_P0.9", "T1.5_P0.5"):
        temperature, top_p = (float(part[1:]) for part in name.split("_"))
        probabilities = jax.nn.softmax(warp_logits(jnp.asarray(reference["logits"]), temperature, 50, top_p))
        np.testing.assert_allclose(probabilities, reference[f"probs_{name}"], atol=1e-6)


def _converted(out: Path, files: dict[str, Path], **instead: Path) -> Model:
    """Convert the golden files with some of them replaced."""
    chosen = {**files, **instead}
    llama = chosen.pop("llama")
    convert.convert(convert.plan(llama_directory=llama, files=chosen, config=GOLDEN_HEADS), out)
    return load(out)


@pytest.mark.slow
def test_safetensors_and_bin_give_the_same_llama(golden, golden_files, model, tmp_path):
    other = _converted(tmp_path / "model", golden_files, llama=golden / "weights/llama-st")
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), model.network, other.network)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_vicuna_v0_with_a_pad_token_equals_the_originals(golden, golden_files, tmp_path):
    other = _converted(tmp_path / "model", golden_files, llama=golden / "weights/llama-v0pad")
    assert (other.config.llama.vocab_size, other.tokenizer.vocab_size) == (601, 601)
    reference = np.load(golden / "train/s1_vision_noprompt_v0pad.npz")
    mask = reference["attention_mask"].astype(bool)
    logits = jax.jit(lambda network, x, mask: network(x, mask))(other.network, reference["inputs_embeds"], mask)
    assert_close(np.asarray(logits)[mask], reference["logits"][mask])


@pytest.mark.slow
def test_checkpoints_of_the_second_release_equal_the_originals(golden, golden_files, tmp_path):
    pair = golden / "weights/videollama2_style"
    vl, al = pair / "VL_LLaMA_2_7B_Finetuned.pth", pair / "AL_LLaMA_2_7B_Finetuned.pth"
    network = _converted(tmp_path / "model", golden_files, vl=vl, al=al).network
    variants = np.load(golden / "extra/variants.npz")
    video = jax.jit(lambda network, x: network.encode_video(x))(network, frames_of(golden, "birthday"))
    assert_close(video, variants["videollama2_birthday_video_tokens"])
    mel = np.load(golden / "media/boat_audio.npz")["mel"][None, :, 0]
    audio = jax.jit(lambda network, x: network.encode_audio(x))(network, mel)
    assert_close(audio, variants["videollama2_boat_audio_tokens"])


@pytest.mark.slow
def test_logits_of_padded_training_batches_equal_the_originals(golden, model):
    run = jax.jit(lambda network, x, mask: network(x, mask))
    for name in ("s1_vision_noprompt", "s2_vision_vicuna"):
        reference = np.load(golden / f"train/{name}.npz")
        prefix = "llm_" if name.startswith("s2") else ""
        mask = reference[f"{prefix}attention_mask"].astype(bool)
        logits = run(model.network, reference[f"{prefix}inputs_embeds"], mask)
        assert_close(np.asarray(logits)[mask], reference[f"{prefix}logits"][mask])


@pytest.mark.parametrize("clip", ["dog_barking.mp4", "birthday.mp4", "dog.jpg"])
def test_chat_answers_equal_the_originals(golden, shared, model, chats, clip):
    """From the real file to the original's greedy tokens and answer."""
    case = {"dog_barking.mp4": "audio_video", "birthday.mp4": "video_no_audio_stream", "dog.jpg": "image"}[clip]
    expected = chats[f"vicuna_{case}_turn1"]
    chat = Chat(model)
    report = chat.add(shared / "media" / clip)
    assert report.audio == ("used" if clip == "dog_barking.mp4" else "absent")
    texts = list(chat.ask(_question(expected["messages"][0][1]), max_new_tokens=20))
    assert [1, *chat.last.tokens] == expected["greedy"]
    assert "".join(texts) == chat.last.answer


def test_prepared_media_equal_the_golden_values(golden, shared, model):
    prepared = prepare_media(shared / "media/boat.mp4", model.config)
    np.testing.assert_allclose(prepared.frames, frames_of(golden, "boat")[0], atol=1e-6)
    assert np.abs(prepared.mel - np.load(golden / "media/boat_audio.npz")["mel"][:, 0]).mean() < 1e-3
