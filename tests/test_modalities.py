"""Texts and sounds, by hand: what becomes of them, how they are encoded and decoded, and how kinds are joined."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete

from agents.policy import Policy
from envs import make_env
from envs.dummy_told import COLUMN_WORDS, COLUMNS, CYCLES, ROW_WORDS, ROWS, All, Instruction, Known, New, Told, Tone
from envs.spaces import describe, rebuild
from modalities import kind_of, nets, obs_spec
from modalities.audio import spectrum, strips
from modalities.audio.nets import Waveform
from modalities.joint import MultiEncoder
from modalities.text import pages
from modalities.text.nets import Autoregressive, AutoregressiveDecoder, Parallel, TextEncoder, ended
from modalities.text.space import END, PAD, Tokens, read, vocabulary
from ops.attention import Attention, masked_mean
from ops.layers import Conv1d, ConvTranspose1d, Style
from ops.random import drawing_from
from specs import Observed, ObsSpec, act_spec, tagged
from tests.factories import (
    Section,
    Toy,
    Watch,
    check_conformance,
    env_config,
    initial,
    make_config,
    make_dreamer,
    make_toy,
    one_line_error,
    play,
)
from training.config import CONFIGS, load_config

F32 = np.float32
TEXT = Observed("text", (6,), (9,) * 6)
WAVE = Observed("audio", (64, 1))


def text_section(**changes):
    return SimpleNamespace(**{"length": 6, "tokenizer": "", "embeddings": "", **changes})


def said(text, **changes):
    """Return the ids of a text as an environment gives it, and what is read of them."""
    env = make_toy(Toy(spaces.Text(99), lambda step: text), text=text_section(**changes))
    ids = env.reset()["text"]
    assert env.obs_space["text"].contains(ids) and ids.dtype == np.int32
    return ids.tolist(), read(ids, vocabulary(text_section(**changes)))


# ---------------------------------------------------------------------------
# Texts from an environment


@pytest.mark.parametrize(
    "text, ids, back",
    [
        ("go", [2 + 103, 2 + 111, END, PAD, PAD, PAD], "go"),
        ("", [END, PAD, PAD, PAD, PAD, PAD], ""),
        ("sixsix", [2 + ord(letter) for letter in "sixsix"], "sixsix"),
        ("longer than the limit", [2 + ord(letter) for letter in "longer"], "longer"),
        ("aaaaaé", [2 + 97] * 5 + [END], "aaaaa"),  # no half of a character
        ("жж", [2 + byte for byte in "жж".encode()] + [END, PAD], "жж"),
        ("\ud800", [2 + 63, END, PAD, PAD, PAD, PAD], "?"),
    ],
)
def test_a_text_is_its_bytes_then_an_end_and_as_much_as_there_is_room_for(text, ids, back):
    assert said(text) == (ids, back)


def test_bytes_are_a_text_if_they_are_told_to_be():
    ram = np.array([0, 1, 255, 7], np.uint8)
    toy = Toy(Box(0, 255, (4,), np.uint8), lambda step: ram)
    assert kind_of(make_toy(toy).obs_space["state"]) == "vector"
    env = make_toy(toy, modalities=Section(state="text"))
    assert env.reset()["state"].tolist() == [2, 3, 257, 9] and kind_of(env.obs_space["state"]) == "text"


def test_a_tokenizer_from_a_file_gives_its_own_words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"go": 0, "left": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    assert said("go left", tokenizer=path) == ([2, 3, END, PAD, PAD, PAD], "go left")
    assert said("налево go", tokenizer=path)[0][:3] == [4, 2, END]
    gaps, strict = str(tmp_path / "gaps.json"), str(tmp_path / "strict.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"go": 0, "left": 9}, unk_token="go")).save(gaps)
    assert vocabulary(text_section(tokenizer=gaps)).size == 2 + 10
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"go": 0}, unk_token="?")).save(strict)
    assert "it has no tokens for 'left'" in one_line_error(lambda: said("left", tokenizer=strict))
    (tmp_path / "other.json").write_text("{}")
    for name, words in (("other.json", "expected a tokenizer.json"), ("none.json", "there is no such file")):
        assert words in one_line_error(said_by(tokenizer=str(tmp_path / name)))


def said_by(**changes):
    return lambda: said("go", **changes)


def test_sentences_of_a_file_are_known_by_their_vectors_which_stay_fixed(tmp_path):
    path = str(tmp_path / "known.npz")
    np.savez(path, sentences=np.array(["go left", "go right"]), vectors=np.eye(2, 3, dtype=F32))
    assert said("go right", embeddings=path) == ([3, END], "go right")
    assert "has no sentence 'go up', which was observed" in one_line_error(lambda: said("go up", embeddings=path))
    encoder = nets("text").make_encoder(
        {"text": Observed("text", (2,), (4, 4))}, make_config("--text.embeddings", path)
    )
    assert "embed.vectors" not in dict(encoder.named_parameters())
    one, other = (encoder({"text": torch.tensor([[index, END]])}, torch.float32) for index in (2, 3))
    assert not torch.equal(one, other)
    np.savez(path + ".bad.npz", sentences=np.array([1.0]), vectors=np.eye(1))
    assert "expected an .npz of sentences" in one_line_error(said_by(embeddings=path + ".bad.npz"))
    np.savez(path + ".pickle.npz", sentences=np.array([{}], object), vectors=np.eye(1))
    assert "expected an .npz of sentences" in one_line_error(said_by(embeddings=path + ".pickle.npz"))


MISTAKES = {
    "no text": (Toy(spaces.Text(9), lambda step: 3), {}, "'text' is a int where its space has text"),
    "nothing": (Toy(spaces.Text(9), lambda step: None), {}, "'text' is None where its space has text"),
    "bytes": (Toy(spaces.Text(9), lambda step: b"go"), {}, "'text' is bytes where its space has text: decode them"),
    "too short": (Toy(spaces.Text(9, min_length=3), lambda step: "go"), {}, "is 'go', of 2 characters, where its"),
    "another letter": (Toy(spaces.Text(9, charset="abg"), lambda step: "go"), {}, "has 'o', which is none of the"),
    "not a number": (
        Toy(Box(-1, 1, (8,)), lambda step: np.full(8, np.nan, F32)),
        {"modalities": Section(state="audio")},
        "'state' is not finite: nan (8 of 8 numbers)",
    ),
    "another length": (
        Toy(Box(-1, 1, (8,)), lambda step: np.zeros(7, F32)),
        {"modalities": Section(state="audio")},
        "'state' has shape (7,) where its space has (8,)",
    ),
    "no such key": (Toy(spaces.Text(9)), {"modalities": Section(ram="text")}, "--modalities.ram: there is no such"),
    "no such kind": (Toy(spaces.Text(9)), {"modalities": Section(text="smell")}, "expected one of vector, image"),
    "no bytes": (Toy(Box(-1, 1, (8,))), {"modalities": Section(state="text")}, "text is a Text space or bytes"),
    "words of bytes": (
        Toy(Box(0, 255, (4,), np.uint8)),
        {"modalities": Section(state="text"), "text": text_section(tokenizer="tokenizer.json")},
        "leave --text.tokenizer",
    ),
    "no waveform": (Toy(Discrete(3)), {"modalities": Section(state="audio")}, "audio is a Box (n,) or (n, channels)"),
    "no dict": (Toy(spaces.Text(9), metadata={"optional": ["text"]}), {}, "['optional'] text: there is no such"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_text_or_sound_is_one_line(name):
    toy, changes, words = MISTAKES[name]
    assert words in one_line_error(lambda: make_toy(toy, **changes).reset())


def test_what_was_told_of_a_space_is_saved_with_it():
    limited = spaces.Text(7, min_length=2, charset="abc")
    assert rebuild(describe(limited)) == limited
    for space in (tagged(Box(-1, 1, (8,)), "audio", optional=True), spaces.Text(7, min_length=0), limited):
        again = rebuild(describe(space))
        assert describe(again) == describe(space) and kind_of(again) == kind_of(space)


# ---------------------------------------------------------------------------
# Sounds from an environment


@pytest.mark.parametrize(
    "space, value, heard",
    [
        (Box(0, 255, (4,), np.uint8), 128, 128),
        (Box(-32768, 32767, (4,), np.int16), 16384, 0.5),
        (Box(-(2**31), 2**31 - 1, (4,), np.int32), 2**30, 0.5),
        (Box(-1, 1, (4, 2)), 0.25, 0.25),
        (Box(-np.inf, np.inf, (4,)), 3.0, 3.0),
        (Box(-10, 10, (4,)), 5.0, 0.5),
    ],
)
def test_a_waveform_keeps_its_bytes_and_is_else_scaled_from_its_bounds(space, value, heard):
    toy = Toy(spaces.Dict(mic=space), lambda step: {"mic": np.full(space.shape, value, space.dtype)})
    toy.metadata = {"modalities": {"mic": "audio"}}
    env = make_toy(toy)
    wave = env.reset()["mic"]
    assert wave.shape == (4, 2 if len(space.shape) > 1 else 1) and wave.dtype == env.obs_space["mic"].dtype
    np.testing.assert_allclose(wave, heard)


def test_what_is_missing_is_none_or_left_out_and_an_integer_says_so():
    space = spaces.Dict({"mic": Box(-1, 1, (4,)), "state": Box(-1, 1, (2,))})
    given = [{"mic": np.ones(4, F32)}, {"mic": None}, {}]
    toy = Toy(space, lambda step: {"state": np.zeros(2, F32), **given[step % 3]})
    toy.metadata = {"modalities": {"mic": "audio"}, "optional": ["mic"]}
    stream = play(make_toy(toy), 5)
    assert [int(obs["mic/present"]) for obs in stream] == [1, 0, 0] * 2
    assert [float(obs["mic"].sum()) for obs in stream] == [4, 0, 0] * 2


def test_bytes_of_a_sound_that_is_missing_are_silent():
    space = spaces.Dict({"mic": Box(0, 255, (4,), np.uint8), "state": Box(-1, 1, (2,))})
    toy = Toy(space, lambda step: {"state": np.zeros(2, F32), "mic": None if step % 2 else np.full(4, 192, np.uint8)})
    toy.metadata = {"modalities": {"mic": "audio"}, "optional": ["mic"]}
    stream = play(make_toy(toy), 3)
    assert [obs["mic"].ravel().tolist() for obs in stream] == [[192] * 4, [128] * 4] * 2


@pytest.mark.parametrize("optional", [[], ["mic"]])
def test_no_observation_is_called_as_what_says_that_another_is_there(optional):
    both = {"mic": Box(-1, 1, (4,)), "mic/present": Discrete(2), "door/present": Discrete(2)}
    toy = Toy(spaces.Dict(both), metadata={"optional": optional})
    said = one_line_error(make_toy, toy)
    assert "observation 'mic/present' would say whether there is 'mic': give it another name" in said
    assert make_toy(toy, mlp_keys="mic/|door").obs_space.keys() == {"mic/present", "door/present"}


SEEN = [None, 1, 2, None, None, 3, 4, 5, None, 6, 7, 8, 9]  # brightness of the images of an episode of a toy
STACKS = [(0, 0), (1, 1), (1, 2), (0, 0), (0, 0), (2, 3), (3, 4), (4, 5), (0, 0), (5, 6), (6, 7), (7, 8), (8, 9)]


def test_a_stack_of_images_that_may_be_missing_has_those_of_its_episode_alone():
    image = Box(0, 255, (64, 64, 3), np.uint8)
    space, shown = spaces.Dict({"image": image, "state": Box(-1, 1, (2,))}), []

    def look(step):
        bright = None if SEEN[step] is None else np.full(image.shape, SEEN[step], np.uint8)
        shown.append({"image": bright, "state": np.zeros(2, F32)})
        return shown[-1]

    env = make_toy(Toy(space, look, metadata={"optional": ["image"]}), frame_stack=2)
    stream = play(env, 25)
    pairs = [(int(obs["image"][0, 0, 0]), int(obs["image"][0, 0, 3])) for obs in stream]
    assert pairs == STACKS * 2
    policy, frames = user_of(env, "--frame_stack", "2"), {}
    for given, obs in zip(shown, stream, strict=True):  # a trained agent sees what it has learned from
        batch, frames = policy.stacked(policy.batch(given, obs["is_first"])[0], frames)
        assert np.array_equal(batch["image"][0], obs["image"])


def user_of(env, *flags):
    """Return the Policy of an agent that nobody asks to act, for an environment's observations."""
    agent = SimpleNamespace(obs_spec=obs_spec(env.obs_space), act_spec=act_spec(env.act_space))
    return Policy(agent, make_config(*flags), env.own)


def test_a_trained_agent_takes_what_an_environment_may_give_and_refuses_what_it_may_not():
    own = {"mic": Box(0, 255, (4,), np.uint8), "said": spaces.Text(9, charset="abc"), "loud": Box(-1, 1, (4,))}
    toy = Toy(spaces.Dict(own), metadata={"modalities": {"mic": "audio", "loud": "audio"}, "optional": [*own]})
    policy = user_of(make_toy(toy))
    whole = {"mic": np.full(4, 192, np.uint8), "said": "ab", "loud": np.full(4, 0.5, F32)}
    for obs in ({}, dict.fromkeys(own), {**whole, **{f"{key}/present": False for key in own}}):
        batch, single = policy.batch(obs, True)
        assert single and (batch["mic"] == 128).all() and not batch["said"].any() and not batch["loud"].any()
        assert [batch[f"{key}/present"].tolist() for key in own] == [[0]] * 3
    for obs in ({"mic": [None, None]}, {"is_first": [True, False]}, {f"{key}/present": [0, 0] for key in own}):
        batch, single = policy.batch(obs, True)
        assert not single and batch["mic/present"].tolist() == [0, 0] and (batch["mic"] == 128).all()
    some = {"mic": [None, whole["mic"]], "said": ["ab", None], "loud": np.array([None, None])}
    batch, single = policy.batch(some, True)
    assert not single and batch["mic"][..., 0].tolist() == [[128] * 4, [192] * 4]
    assert [batch[f"{key}/present"].tolist() for key in own] == [[0, 1], [1, 0], [0, 0]]
    for wrong, words in (
        ({**whole, "mic": np.full(4, 300)}, "mic is 300 where its space has 0 to 255"),
        ({**whole, "mic": np.full(4, 0.5)}, "mic is 0.5 where its space has uint8 (4,)"),
        ({**whole, "said": "abd"}, "said has 'd', which is none of the characters"),
        ({"mic": [None, whole["mic"]], "said": ["ab"]}, "expected as many of each observation"),
        ({"mic": [None, None], "said": "ab"}, "said is of one environment, and mic of a batch"),
        (np.zeros(4), "expected an observation with the keys"),
    ):
        assert words in one_line_error(policy.batch, wrong, True)
    policy.converter = None  # as for a checkpoint that lacks the spaces
    plain = policy.batch({"mic": whole["mic"][:, None], "loud": None}, True)[0]
    assert (plain["mic"] == 0.5).all() and plain["mic"].dtype == F32


# ---------------------------------------------------------------------------
# Networks: attention and texts


def test_attention_is_the_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention, x, seen = Attention(4, 2, 3), torch.randn(2, 3, 4), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    query, (key, value) = attention.query(x), attention.keyed(seen).chunk(2, -1)
    heads = []
    for part in (slice(0, 2), slice(2, 4)):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(2)
        heads.append(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ value[..., part])
    torch.testing.assert_close(attention(x, seen, mask), attention.out(torch.cat(heads, -1)))
    assert "3 attention heads do not divide 4 units" in one_line_error(lambda: Attention(4, 3))


def test_the_embedding_of_a_text_is_the_mean_over_what_is_there():
    x = torch.tensor([[[2.0], [4.0], [9.0]], [[1.0], [1.0], [1.0]]])
    assert masked_mean(x, torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()).tolist() == [[3.0], [0.0]]
    torch.manual_seed(0)
    encoder = TextEncoder({"a": TEXT}, make_config().text, "silu")
    ids = torch.tensor([[5, 6, END, PAD, PAD, PAD], [PAD] * 6, [END, PAD, PAD, PAD, PAD, PAD]])
    full = encoder({"a": ids}, torch.float32)
    torch.testing.assert_close(encoder({"a": ids[:, :4]}, torch.float32), full)  # however much room there is
    assert not full[1].any() and full[2].any()  # no text is not an empty one
    other = encoder({"a": ids.flip(0)[:, [1, 0, 2, 3, 4, 5]]}, torch.float32)
    assert not torch.allclose(other[2], full[0])  # the order counts


@pytest.mark.parametrize("decoder", ["parallel", "autoregressive"])
def test_every_parameter_of_a_text_has_a_gradient(decoder):
    config = make_config("--text.decoder", decoder)
    torch.manual_seed(0)
    ids = torch.randint(2, 9, (2, 3, 6))
    encoder = nets("text").make_encoder({"a": TEXT}, config)
    head = nets("text").make_decoder({"a": TEXT}, encoder.size, 0, config)
    embed = encoder({"a": ids.flatten(0, 1)}, torch.float32)
    outs = head(embed, embed[:, :0])
    loss = -head.dist("a", outs["a"].unflatten(0, (2, 3))).log_prob(ids)
    assert loss.shape == (2, 3)
    loss.sum().backward()
    missing = [
        name for part in (encoder, head) for name, p in part.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert missing == []
    assert head.dist("a", outs["a"].unflatten(0, (2, 3))).mode().shape == (2, 3, 6)


def test_the_loss_of_a_text_is_the_cross_entropy_of_what_is_there():
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 3] = math.log(3)
    value = torch.tensor([[3, END, PAD], [PAD, PAD, PAD]])
    expected = torch.tensor([math.log(3 / 6) + math.log(1 / 4), 0.0])
    torch.testing.assert_close(Parallel(logits).log_prob(value), expected)
    assert ended(torch.tensor([[5, END, 7, END], [5, 6, 7, 8]])).tolist() == [[5, END, PAD, PAD], [5, 6, 7, 8]]


def test_an_autoregressive_text_depends_on_what_came_before_alone():
    torch.manual_seed(0)
    decoder = AutoregressiveDecoder({"a": TEXT}, 8, make_config().text, Style())
    source = decoder(torch.randn(1, 8), torch.zeros(1, 0))["a"]
    before = torch.tensor([[END, 5, 6, 7, 8, 2]])
    logits = decoder.logits("a", source, before)
    changed = decoder.logits("a", source, before.clone().index_fill_(1, torch.tensor([3]), 4))
    torch.testing.assert_close(changed[:, :3], logits[:, :3])
    assert not torch.allclose(changed[:, 3:], logits[:, 3:])
    dist = Autoregressive(decoder, "a", source)
    steps = [logits[0, place].log_softmax(-1)[index] for place, index in enumerate([5, 6, 7, 8, 2, 3])]
    torch.testing.assert_close(dist.log_prob(torch.tensor([[5, 6, 7, 8, 2, 3]]))[0], sum(steps))
    best = dist.mode()
    again = decoder.logits("a", source, torch.cat([torch.tensor([[END]]), best[:, :-1]], 1)).argmax(-1)
    torch.testing.assert_close(ended(again), best)  # greedy: each is the likeliest behind those chosen


# ---------------------------------------------------------------------------
# Networks: sounds


def test_the_transposed_convolution_is_the_transpose():
    torch.manual_seed(0)
    conv, transposed = Conv1d(2, 3, 8, 4), ConvTranspose1d(3, 2, 8, 4)
    transposed.weight.data, x, y = conv.weight.data, torch.randn(1, 16, 2), torch.randn(1, 4, 3)
    torch.testing.assert_close((conv(x) * y).sum(), (x * transposed(y)).sum())
    assert conv(torch.randn(1, 17, 2)).shape == (1, 5, 3) and conv.size(17) == 5
    plain = torch.nn.functional.conv1d(torch.nn.functional.pad(x.transpose(1, 2), (2, 2)), conv.weight, None, 4)
    torch.testing.assert_close(conv(x), plain.transpose(1, 2))


def test_the_spectrum_of_a_sine_stands_at_its_frequency():
    time = torch.arange(512) / 512
    wave = torch.stack([torch.sin(2 * math.pi * 64 * time), torch.zeros(512)], -1)[None]  # 8 cycles in 64 samples
    made = spectrum.Spectrum(64)
    found = made(wave)
    assert found.shape == (1, made.frames(512), 2, 33) == (1, 17, 2, 33)
    inner = found[0, 2:-2, 0].mean(0)
    assert inner.argmax() == 8 and inner[8] == pytest.approx(1, abs=1e-3) and found[0, :, 1].max() < 1e-5
    noise = torch.randn(1, 512, 1)
    theirs = torch.stft(noise[..., 0], 64, 32, window=torch.hann_window(64), return_complex=True).abs() * 4 / 64
    torch.testing.assert_close(made(noise)[0, :, 0].T, theirs[0], atol=1e-5, rtol=1e-4)
    bands = spectrum.mel_bands(8, 64, 16000)
    assert bands.shape == (33, 8) and (bands >= 0).all() and bands.max() <= 1 and (bands.sum(0) > 0).all()
    assert (bands.argmax(0).diff() >= 0).all()


@pytest.mark.parametrize("flags", [[], ["--audio.mel", "4", "--audio.window", "16"]])
def test_every_parameter_of_a_sound_has_a_gradient(flags):
    config = make_config("--audio.spectrum", "1", *flags)
    torch.manual_seed(0)
    encoder = nets("audio").make_encoder({"mic": WAVE}, config)
    decoder = nets("audio").make_decoder({"mic": WAVE}, encoder.size, 0, config)
    bytes_ = torch.randint(0, 256, (2, 3, 64, 1), dtype=torch.uint8)
    wave = encoder.prepare({"mic": bytes_})["mic"]
    assert wave.min() >= -1 and wave.max() < 1 and torch.equal(wave * 128 + 128, bytes_.float())
    embed = encoder({"mic": wave.flatten(0, 1)}, torch.float32)
    assert embed.shape == (6, encoder.size)
    out = decoder(embed, embed[:, :0])["mic"]
    loss = -decoder.dist("mic", out.unflatten(0, (2, 3))).log_prob(wave)
    assert loss.shape == (2, 3)
    loss.sum().backward()
    assert all(p.grad.any() for part in (encoder, decoder) for p in part.parameters())


def test_the_loss_of_a_sound_is_the_squared_error_and_the_distance_of_spectra():
    silence, wave = torch.zeros(1, 64, 1), torch.full((1, 64, 1), 0.5)
    assert Waveform(silence).log_prob(wave).item() == -16
    spectra = [spectrum.LogSpectrum(window) for window in (64, 256, 1024)]
    assert Waveform(wave, 1.0, spectra).log_prob(wave).item() == 0
    time = torch.arange(256)[None, :, None] / 256
    one, moved, other = (torch.sin(2 * math.pi * (f * time + p)) for f, p in ((32, 0), (32, 0.5), (64, 0)))
    apart = [-(Waveform(one, 1.0, spectra).log_prob(x) - Waveform(one).log_prob(x)).item() for x in (moved, other)]
    assert apart[0] < 0.05 * apart[1]  # a spectrum does not tell where a wave begins


@pytest.mark.parametrize("samples", range(64, 72))
def test_a_window_of_any_length_has_as_many_frames_as_it_says(samples):
    for window in range(4, 20):
        made = spectrum.Spectrum(window)
        assert made(torch.zeros(1, samples, 1)).shape == (1, made.frames(samples), 1, window // 2 + 1)
    config = make_config("--audio.mel", "2", "--audio.window", "33", "--encoder.fusion", "attention")
    encoder = MultiEncoder(ObsSpec({"mic": Observed("audio", (samples, 1))}), config)
    assert encoder({"mic": torch.zeros(1, 1, samples, 1)}, torch.float32).shape == (1, 1, encoder.size)


def test_settings_that_would_do_nothing_or_do_not_divide_are_one_line():
    make, short = nets("audio").make_decoder, {"mic": Observed("audio", (63, 1))}
    said = one_line_error(make, short, 8, 0, make_config("--audio.spectrum", "1"))
    assert said.startswith("--audio.spectrum 1: the sounds have up to 63 samples, fewer than the 64")
    make({**short, "long": WAVE}, 8, 0, make_config("--audio.spectrum", "1"))
    said = one_line_error(
        nets("audio").make_encoder, {"mic": WAVE}, make_config(*["--audio.mel", "30", "--audio.window", "64"])
    )
    assert said.startswith("--audio.mel 30: ") and "see no frequency of --audio.window 64 at --audio.rate 16000" in said
    said = one_line_error(nets("text").make_encoder, {"said": TEXT}, make_config("--text.heads", "3"))
    assert said.startswith("--text.heads 3: 3 attention heads do not divide ")
    config = make_config("--encoder.fusion", "attention", "--encoder.units", "6")
    assert one_line_error(MultiEncoder, SPEC, config).startswith("--encoder.units 6: 4 attention heads do not divide 6")


def test_sizes_that_do_not_fit_are_one_line():
    make = nets("audio").make_encoder
    assert "--audio.window 256 must not be more" in one_line_error(make, {"mic": WAVE}, make_config("--audio.mel", "8"))
    assert "--audio.kernel 2" in one_line_error(make, {"mic": WAVE}, make_config("--audio.kernel", "2"))


# ---------------------------------------------------------------------------
# All kinds together

SPEC = ObsSpec(
    {
        "image": Observed("image", (16, 32, 3)),
        "state": Observed("vector", (2,)),
        "said": TEXT,
        "mic": WAVE,
        "mic/present": Observed("vector", (1,), (2,)),
    }
)


def observation(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(256, (2, 3, 16, 32, 3), generator=rng, dtype=torch.uint8),
        "state": torch.randn(2, 3, 2, generator=rng),
        "said": torch.randint(2, 9, (2, 3, 6), generator=rng),
        "mic": torch.rand(2, 3, 64, 1, generator=rng),
        "mic/present": torch.tensor([[1, 0, 1], [0, 0, 1]]),
    }


def test_by_default_embeddings_stand_side_by_side():
    torch.manual_seed(0)
    encoder, obs = MultiEncoder(SPEC, make_config()), observation()
    assert list(encoder.parts) == ["vector", "image", "text", "audio_0"]  # what may be missing has a part of its own
    embed = encoder(obs, torch.float32)
    flat = {key: value.flatten(0, 1) for key, value in obs.items()}
    parts = [
        part({key: flat[key] for key in encoder.keys[name]}, torch.float32) for name, part in encoder.parts.items()
    ]
    parts[-1] = parts[-1] * obs["mic/present"].view(-1, 1)
    assert torch.equal(embed.flatten(0, 1), torch.cat(parts, -1))


@pytest.mark.parametrize("fusion", ["concat", "attention"])
def test_what_is_missing_counts_for_nothing(fusion):
    torch.manual_seed(0)
    encoder, obs = MultiEncoder(SPEC, make_config("--encoder.fusion", fusion)), observation()
    embed = encoder(obs, torch.float32)
    louder = encoder({**obs, "mic": 1 - obs["mic"]}, torch.float32)
    there = obs["mic/present"] > 0
    assert torch.equal(embed[~there], louder[~there])
    assert (embed[there] != louder[there]).any(-1).all()


@pytest.mark.parametrize("fusion", ["concat", "attention"])
def test_learning_leaves_out_kinds_by_chance_and_acting_does_not(fusion):
    torch.manual_seed(0)
    encoder = MultiEncoder(SPEC, make_config("--encoder.fusion", fusion, "--encoder.drop", "0.5"))
    first, second = observation(0), observation(1)
    with drawing_from(lambda kind, shape: torch.zeros(shape)):  # all are left out
        one, other = (encoder(obs, torch.float32, learning=True) for obs in (first, second))
        assert torch.allclose(one, other) and torch.isfinite(one).all()
        assert not torch.allclose(encoder(first, torch.float32), one)
    with drawing_from(torch.Generator().manual_seed(0)):
        drawn = [encoder(first, torch.float32, learning=True) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_attention_sees_every_kind_and_every_parameter_of_it_learns():
    torch.manual_seed(0)
    encoder, obs = MultiEncoder(SPEC, make_config("--encoder.fusion", "attention")), observation()
    other = observation(1)
    embed = encoder(obs, torch.float32)
    assert embed.shape == (2, 3, 4 * 16)
    for key in ("image", "state", "said"):
        assert not torch.allclose(encoder({**obs, key: other[key]}, torch.float32), embed)
    embed.square().sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if name != "join.nothing")


def sequences(env, count=3, length=8):
    """Return a batch of sequences of an environment's steps with random actions, as from the replay."""
    stream = play(env, count * length - 1)
    keys = [*env.obs_space, "reward", "is_first", "is_last", "is_terminal"]
    arrays = {key: np.stack([obs[key] for obs in stream]) for key in keys}
    batch = {key: torch.from_numpy(value).unflatten(0, (count, length)) for key, value in arrays.items()}
    spec = act_spec(env.act_space)
    drawn = {key: torch.from_numpy(value) for key, value in spec.uniform(np.random.default_rng(0), len(stream)).items()}
    return batch | {key: value.unflatten(0, (count, length)) for key, value in drawn.items()}


@pytest.mark.parametrize(
    "flags", [[], ["--text.decoder", "autoregressive", "--audio.mel", "8", "--audio.spectrum", "1"]]
)
def test_an_update_on_all_kinds_never_waits_for_a_number(flags, monkeypatch):
    monkeypatch.setattr(F, "one_hot", lambda index, size: index[..., None] == torch.arange(size))
    config = make_config("--configs", "multimodal", "debug", "--encoder.drop", "0.1", "--size", "16", "16", *flags)
    env = make_env(config, "train", 0)
    agent = make_dreamer(env.obs_space, env.act_space, config)
    with Watch() as watch:
        _, metrics = agent.update(sequences(env), initial(agent))
    assert watch.count > 1000 and watch.found == []
    assert all(math.isfinite(metrics[f"{key}_loss"]) for key in env.obs_space)


# ---------------------------------------------------------------------------
# What is shown


def test_texts_are_drawn_and_read_and_sounds_are_drawn_and_heard():
    words = vocabulary(text_section())
    ids = np.array([[[2 + 103, 2 + 111, END, PAD]] * 4] * 3)
    drawing = pages.draw(ids, np.full_like(ids, PAD), 2, words)
    assert drawing.lines[2] == [("go", "")] * 4 and drawing[0].shape[:2] == (2, 4) and drawing[0].dtype == np.uint8
    assert len(np.unique(drawing[0][0, 0].reshape(-1, 3), axis=0)) > 3  # letters
    assert pages.wrapped("a\0b\n\u202e") == ["a·b··"]
    long, short = pages.page("word " * 99, "", True), pages.page("word", "", True)
    assert long.shape == short.shape == (2 * pages.MOST * pages.LINE + 12, pages.WIDTH, 3)
    wave = np.sin(np.arange(3 * 4 * 512).reshape(3, 4, 512, 1)).astype(F32)
    heard = strips.draw((wave * 127 + 128).astype(np.uint8), wave * 2, 2, 16000)
    rate, sound = heard.sound
    assert (rate, sound.shape, heard[0].shape) == (16000, (3, 4 * 512, 2), (2, 4, 2 * strips.HEIGHT, strips.WIDTH, 3))
    assert np.abs(sound[..., 0].reshape(wave.shape[:3]) - wave[..., 0]).max() < 0.02 and sound.max() == 1


# ---------------------------------------------------------------------------
# Worlds that tell


def test_the_worlds_that_tell_say_where_the_goal_is():
    env = make_env(env_config("dummy_instruction"), "train", 0)
    check_conformance(env)
    native = Instruction(np.random.default_rng(0), (8, 8))
    for _ in range(20):
        words = native.reset()["instruction"].split()
        assert native._goal == (ROWS.index(words[-2]), COLUMNS.index(words[-1])) and native._place != native._goal
    heard = Tone(np.random.default_rng(0), (8, 8))
    for _ in range(8):
        wave = heard.reset()["tone"]
        assert np.abs(np.fft.rfft(wave)).argmax() == CYCLES[heard._goal[1]]
    check_conformance(make_env(env_config("dummy_tone"), "train", 0))


def test_new_instructions_are_words_that_were_seen_in_pairs_that_were_not():
    assert len(Known.pairs) == 120 and len(New.pairs) == 24 and not set(Known.pairs) & set(New.pairs)
    for word in range(12):
        assert [sum(pair[axis] == word for pair in Known.pairs) for axis in (0, 1)] == [10, 10]
    assert set(Known.goals) == set(New.goals) == set(Told.goals) and Known.best() == New.best() == Instruction.best()
    world = New(np.random.default_rng(0), (8, 8))
    for _ in range(40):
        row, column = world.reset()["instruction"].split()[-2:]
        assert world._goal == (ROW_WORDS.index(row) // 3, COLUMN_WORDS.index(column) // 3)
    told = {mode: set() for mode in ("train", "eval")}
    for mode, found in told.items():
        env = make_env(env_config("dummy_instruction_new"), mode, 0)
        found |= {env.reset()["instruction"].tobytes() for _ in range(60)}
    assert not told["train"] & told["eval"]


def test_the_best_return_is_that_of_who_walks_straight():
    for task in (Instruction, Tone, All):
        world = task(np.random.default_rng(0), (8, 8))
        returns = []
        for _ in range(400):
            world.reset()
            total, over = 0.0, False
            while not over:
                (row, column), (place, at) = world._goal, world._place
                move = 1 if row < place else 3 if row > place else 2 if column > at else 4 if column < at else 0
                obs = world.step({"action": move})
                total, over = total + obs["reward"], obs["is_last"]
            returns.append(total)
        assert np.mean(returns) == pytest.approx(task.best(), abs=0.3)


def test_all_kinds_are_needed_where_there_are_all():
    env = make_env(env_config("dummy_all", size=(16, 16)), "train", 0)
    kinds = {key: seen.kind for key, seen in obs_spec(env.obs_space).items()}
    assert kinds.pop("tone/present") == "vector"
    assert kinds == {"image": "image", "opposite": "vector", "instruction": "text", "tone": "audio"}
    stream = play(env, 9)
    assert [int(obs["tone/present"]) for obs in stream[:7]] == [1, 0, 0, 1, 0, 0, 1]
    assert isinstance(env.obs_space["instruction"], Tokens) and isinstance(env.obs_space["tone/present"], Discrete)


@pytest.mark.parametrize(
    "suite, task", [("minigrid", "minigrid_"), ("atari100k", "atari100k_"), ("crafter", "crafter_")]
)
def test_the_preset_multimodal_goes_behind_a_suite(suite, task):
    config = load_config(["--configs", suite, "multimodal"], CONFIGS)
    assert config.task.startswith(task) and config.encoder.fusion == "attention"
    assert all(config.encoder[key] == ".*" for key in ("mlp_keys", "cnn_keys", "text_keys", "audio_keys"))
