from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box, Discrete

from modalities.joint import MultiDecoder, MultiEncoder
from networks import Actor, scalar_head
from ops.layers import BlockLinear, Conv2d, Linear, Norm
from rssm import RSSM, BlockGRU, OneHotLatent, State, feature
from specs import ActionSpec, Observed, ObsSpec
from tests.factories import CONFIGS, IMAGE, WALKER, make_config, make_dreamer
from training.config import load_config

B, T, D, E, A, S, K = 3, 7, 12, 5, 2, 4, 3


def make_rssm(unimix=0.01):
    torch.manual_seed(0)
    latent = OneHotLatent(S, K, unimix)
    cell = BlockGRU(D, latent.size, A, hidden=6, blocks=3, layers=2)
    config = SimpleNamespace(deter=D, hidden=6, img_layers=2, obs_layers=2, initial="zeros")
    return RSSM(cell, latent, E, config)


def make_sequence(device=None):
    embed, action = torch.randn(B, T, E, device=device), torch.randn(B, T, A, device=device)
    is_first = torch.zeros(B, T, dtype=torch.bool, device=device)
    return embed, action, is_first, torch.rand(B, T, S, device=device)


def random_state(count):
    return State(torch.randn(count, D), torch.eye(K)[torch.randint(K, (count, S))])


# ---------------------------------------------------------------------------
# Observing


def test_after_a_reset_nothing_of_the_past_remains():
    rssm = make_rssm()
    embed, action, is_first, noise = make_sequence()
    is_first[1, 3] = True  # only one of the sequences
    other_embed, other_action = embed.clone(), action.clone()
    other_embed[:, :3], other_action[:, :4] = (
        torch.randn(B, 3, E),
        torch.randn(B, 4, A),
    )  # action[3] led out of the past
    ours, post = rssm.observe(embed, action, is_first, rssm.initial(B, "cpu"), noise)
    theirs, other_post = rssm.observe(other_embed, other_action, is_first, random_state(B), noise)
    assert torch.equal(ours.deter[1, 3:], theirs.deter[1, 3:]) and torch.equal(ours.stoch[1, 3:], theirs.stoch[1, 3:])
    assert torch.equal(post.logits[1, 3:], other_post.logits[1, 3:])
    for b, t in ((0, 3), (2, 3), (1, 2)):  # without the flag, or before it, the past matters
        assert not torch.equal(ours.deter[b, t], theirs.deter[b, t])


def test_no_gradient_crosses_a_reset():
    rssm = make_rssm()
    embed, action, is_first, noise = make_sequence()
    is_first[:, 3] = True
    states, _ = rssm.observe(embed.requires_grad_(), action, is_first, rssm.initial(B, "cpu"), noise)
    (grad,) = torch.autograd.grad((states.deter[:, 6] * torch.randn(D)).sum(), embed)
    assert not grad[:, :3].any() and grad[:, 3].any()


def test_observing_and_imagining_never_look_at_a_value():
    # Tensors of the meta device have no values: a branch on one, or .item(), or .cpu(), would raise.
    rssm = make_rssm().to("meta")
    states, _ = rssm.observe(*make_sequence("meta")[:3], rssm.initial(B, "meta"))
    ahead, _ = rssm.imagine(states.map(lambda x: x[:, -1]), torch.randn(4, B, A, device="meta"), 4)
    assert ahead.deter.shape == (5, B, D)


def test_observing_at_once_is_observing_step_by_step():
    rssm = make_rssm()
    embed, action, is_first, noise = make_sequence()
    is_first[0, 0] = is_first[1, 4] = True
    start = random_state(B)
    whole, post = rssm.observe(embed, action, is_first, start, noise)
    state = start
    for t in range(T):
        now = slice(t, t + 1)
        states, one = rssm.observe(embed[:, now], action[:, now], is_first[:, now], state, noise[:, now])
        state = states.map(lambda x: x[:, 0])
        torch.testing.assert_close(state.deter, whole.deter[:, t])
        assert torch.equal(state.stoch, whole.stoch[:, t])
        torch.testing.assert_close(one.probs[:, 0], post.probs[:, t])


def test_a_step_is_cell_then_posterior_of_deter_and_embedding():
    rssm = make_rssm()
    embed, action, is_first, noise = make_sequence()
    start = random_state(B)
    states, post = rssm.observe(embed[:, :1], action[:, :1], is_first[:, :1], start, noise[:, :1])
    deter = rssm.cell(start.deter, start.stoch.flatten(1), rssm.cell.prepare(action[:, 0]))
    logits = rssm.posterior(torch.cat([deter, embed[:, 0]], -1)).unflatten(-1, (S, K))
    torch.testing.assert_close(states.deter[:, 0], deter)
    torch.testing.assert_close(post.probs[:, 0], 0.99 * logits.softmax(-1) + 0.01 / K)
    torch.testing.assert_close(states.stoch[:, 0], post.sample(noise[:, :1])[:, 0])


# ---------------------------------------------------------------------------
# Imagining


def test_imagining_along_actions_is_stepping_by_hand():
    rssm = make_rssm()
    start, actions, noise = random_state(B), torch.randn(4, B, A), torch.rand(4, B, S)
    states, taken = rssm.imagine(start, actions, 4, noise)
    assert torch.equal(taken, actions)
    assert torch.equal(states.deter[0], start.deter) and torch.equal(states.stoch[0], start.stoch)
    deter, stoch = start
    for t in range(4):
        deter = rssm.cell(deter, stoch.flatten(1), rssm.cell.prepare(actions[t]))
        stoch = rssm.predict(deter).sample(noise[t])
        torch.testing.assert_close(states.deter[t + 1], deter)
        assert torch.equal(states.stoch[t + 1], stoch)


def test_fifteen_steps_give_sixteen_states_and_fifteen_actions():
    rssm, seen = make_rssm(), []

    def policy(state):
        seen.append(state.deter)
        return torch.full((B, A), float(len(seen)))

    states, actions = rssm.imagine(random_state(B), policy, 15)
    assert states.deter.shape == (16, B, D) and states.stoch.shape == (16, B, S, K) and actions.shape == (15, B, A)
    assert actions[:, 0, 0].tolist() == list(range(1, 16))
    assert torch.equal(torch.stack(seen), states.deter[:-1])  # action t is chosen in state t; none in the last


def test_the_feature_is_deter_then_stoch():
    state = State(torch.tensor([[1.0, 2]]), torch.tensor([[[3.0, 4, 5], [6, 7, 8]]]))
    assert feature(state).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


# ---------------------------------------------------------------------------
# Cell and layers


def make_cell():
    torch.manual_seed(0)
    cell = BlockGRU(6, S * K, A, hidden=5, blocks=2, layers=1)
    for param in cell.gates.parameters():
        param.data.zero_()
    return cell


def test_a_closed_cell_keeps_most_of_its_state():
    # With all gates at zero the candidate is 0 and the update gate sigmoid(-1) = 0.2689.
    deter = torch.randn(B, 6)
    cell = make_cell()
    out = cell(deter, torch.randn(B, S * K), cell.prepare(torch.randn(B, A)))
    torch.testing.assert_close(out, 0.7310586 * deter)


def test_each_block_holds_its_own_reset_candidate_and_update():
    # Of the 18 outputs, block 0 owns the first nine: three for reset, three for the candidate, three for the update.
    cell, deter = make_cell(), torch.randn(B, 6)
    cell.gates.bias.data[3:6] = 2.0  # candidate of block 0: tanh(sigmoid(0) * 2) = tanh(1)
    cell.gates.bias.data[6:9] = 1.0  # update of block 0: sigmoid(1 - 1) = 1/2
    cell.gates.bias.data[9:12] = 50.0  # reset of block 1, fully open; its candidate is still 0
    out = cell(deter, torch.randn(B, S * K), cell.prepare(torch.randn(B, A)))
    torch.testing.assert_close(out[:, :3], 0.5 * 0.7615942 + 0.5 * deter[:, :3])
    torch.testing.assert_close(out[:, 3:], 0.7310586 * deter[:, 3:])


def test_large_actions_are_scaled_to_one():
    cell = make_cell()
    actions = torch.tensor([[3.0, -0.5], [1.0, -0.5], [-20.0, 0.5], [-1.0, 0.5]])
    prepared = cell.prepare(actions)
    torch.testing.assert_close(prepared[0], prepared[1])
    torch.testing.assert_close(prepared[2], prepared[3])
    large, cotangent = actions[:1].clone().requires_grad_(), torch.arange(5.0)
    (ours,) = torch.autograd.grad((cell.prepare(large) * cotangent).sum(), large)
    scaled = cell.embed_action(large / torch.tensor([3.0, 1.0]))  # the divisor is a constant
    (theirs,) = torch.autograd.grad((scaled * cotangent).sum(), large)
    torch.testing.assert_close(ours, theirs)
    assert theirs.all()


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_norm_is_root_mean_square_then_silu(shape):
    torch.manual_seed(0)
    norm, x = Norm(6), torch.randn(shape, requires_grad=True)
    scale = next(norm.parameters())
    scale.data.normal_()
    unit = x * (x.square().mean(-1, keepdim=True) + 1e-4).rsqrt() * scale
    theirs, ours, cotangent = unit * unit.sigmoid(), norm(x), torch.randn(shape)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad((y * cotangent).sum(), (x, scale)) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_blocks_do_not_see_each_other():
    torch.manual_seed(0)
    layer, x = BlockLinear(8, 12, blocks=4), torch.randn(5, 4, 2, requires_grad=True)
    y = layer(x)
    assert y.shape == (5, 4, 3)
    for block in range(4):
        (grad,) = torch.autograd.grad(y[:, block].sum(), x, retain_graph=True)
        assert grad[:, block].all() and grad.count_nonzero() == 5 * 2
        expected = x[:, block] @ layer.kernel[block] + layer.bias[3 * block : 3 * block + 3]
        torch.testing.assert_close(y[:, block], expected)


def test_initial_weights_have_the_scale_of_their_fan_in():
    # A normal cut at two standard deviations has standard deviation 0.8796; 1.1368 makes it 1 again.
    torch.manual_seed(0)
    kernels = {
        Linear(400, 300).kernel: 1 / 20,
        Linear(400, 300, outscale=0.01).kernel: 0.01 / 20,
        BlockLinear(1024, 1024, blocks=4).kernel: 1 / 32,  # the whole input counts, not the block's share of 256
        Conv2d(64, 64, kernel=5).weight: 1 / 40,  # 64 * 5 * 5 = 1600
    }
    for kernel, std in kernels.items():
        kernel = kernel.detach()
        assert float(kernel.std()) == pytest.approx(std, rel=0.01)
        assert abs(float(kernel.mean())) < 0.02 * std
        assert 1.9 * 1.1368 * std < float(kernel.abs().max()) <= 2 * 1.1368 * std * 1.0001
    assert not Linear(4, 3).bias.any() and not BlockLinear(4, 4, 2).bias.any() and not Conv2d(2, 2, 3).bias.any()


def test_critic_and_reward_start_at_exactly_zero():
    head = scalar_head(9, make_config().critic)
    assert not head(torch.randn(20, 9)).mode().any()


def test_the_actor_puts_its_keys_in_sorted_order():
    torch.manual_seed(0)
    spec = ActionSpec({"buttons": 5, "move": 2}, {"buttons": [2, 3]})
    actor = Actor(9, spec, make_config().actor)
    policy, noise = actor(torch.randn(4, 9)), actor.noise((4,), "cpu")
    assert noise.shape == (4, 2 + 2) and spec.size == 7
    sample = policy.sample(noise)
    assert sample[:, :2].sum(-1).tolist() == [1] * 4 and sample[:, 2:5].sum(-1).tolist() == [1] * 4
    assert actor.noise((9999,), "cpu")[:, 2:].std() == pytest.approx(1, abs=0.03)  # normal for the continuous key
    assert actor.noise((9999,), "cpu")[:, :2].std() == pytest.approx(12**-0.5, abs=0.01)  # uniform for the others


# ---------------------------------------------------------------------------
# Encoders and decoders


def test_the_embedding_is_vectors_then_images_and_ignores_the_order_of_the_keys():
    torch.manual_seed(0)
    image, b, a = Observed("image", (16, 32, 3)), Observed("vector", (2,)), Observed("vector", (1,), (4,))
    spec = ObsSpec({"image": image, "b": b, "a": a})
    encoder = MultiEncoder(spec, make_config())
    obs = {
        "image": torch.randint(256, (2, 3, 16, 32, 3), dtype=torch.uint8),
        "b": torch.randn(2, 3, 2),
        "a": torch.randint(4, (2, 3)),
    }
    embed = encoder(obs, torch.float32)
    assert embed.shape == (2, 3, encoder.size) == (2, 3, 16 + 1 * 2 * 8)  # 16 units; 1x2 places of depth 2 * mult 4
    assert torch.equal(encoder(dict(reversed(obs.items())), torch.float32), embed)
    blind = encoder({**obs, "image": torch.zeros_like(obs["image"])}, torch.float32)
    assert torch.equal(blind[..., :16], embed[..., :16]) and not torch.equal(blind[..., 16:], embed[..., 16:])


def test_two_images_are_decoded_apart():
    torch.manual_seed(0)
    spec = ObsSpec({"rgb": Observed("image", (16, 32, 3)), "gray": Observed("image", (16, 32, 1))})
    decoder = MultiDecoder(spec, 32, 16, make_config())
    state = State(torch.randn(2, 3, 32), torch.randn(2, 3, 4, 4))
    outs = {key: out.mode() for key, out in decoder(state).items()}
    assert {key: tuple(out.shape) for key, out in outs.items()} == {"rgb": (2, 3, 16, 32, 3), "gray": (2, 3, 16, 32, 1)}
    assert all(out.min() > 0 and out.max() < 1 for out in outs.values())


# ---------------------------------------------------------------------------
# Sizes


def count(obs_space, act_space, *flags):
    """Trainable parameters, without memory for them."""
    with torch.device("meta"):
        agent = make_dreamer(obs_space, act_space, load_config(flags, CONFIGS), device="meta")
    return sum(param.numel() for param in agent.nets.parameters() if param.requires_grad)


@pytest.mark.parametrize("size, total", {"size1m": 640_867, "size12m": 9_738_019}.items())
def test_parameters_of_the_walker(size, total):
    assert count(WALKER, {"action": Box(-1, 1, (6,))}, "--configs", "dmc_proprio", size) == total


def test_the_defaults_are_size12m_and_dmc_proprio_is_size1m():
    space = {"action": Box(-1, 1, (6,))}
    assert count(WALKER, space) == 9_738_019
    assert count(WALKER, space, "--configs", "dmc_proprio") == 640_867


# name: deter, hidden, classes, depth, units, millions of parameters (images of 64x64, six continuous actions)
SIZES = {
    "size1m": (512, 64, 4, 4, 64, 0.69),
    "size12m": (2048, 256, 16, 16, 256, 10.5),
    "size25m": (3072, 384, 24, 24, 384, 23.5),
    "size50m": (4096, 512, 32, 32, 512, 41.7),
    "size100m": (6144, 768, 48, 48, 768, 93.5),
    "size200m": (8192, 1024, 64, 64, 1024, 166),
    "size400m": (12288, 1536, 96, 96, 1536, 373),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_the_table(name):
    deter, hidden, classes, depth, units, millions = SIZES[name]
    config = load_config(["--configs", name], CONFIGS)
    rssm = config.rssm
    assert (rssm.deter, rssm.hidden, rssm.stoch, rssm.classes, rssm.blocks) == (deter, hidden, 32, classes, 8)
    assert config.encoder.depth == config.decoder.depth == depth
    parts = (config.encoder, config.decoder, config.reward_head, config.cont_head, config.actor, config.critic)
    assert {part.units for part in parts} == {units}
    image = Box(0, 255, (64, 64, 3), IMAGE.dtype)
    total = count({"image": image}, {"action": Box(-1, 1, (6,))}, "--configs", name) / 1e6
    assert total == pytest.approx(millions, rel=0.007)  # the table has two or three digits


def test_action_spaces_change_only_what_touches_actions():
    plain, discrete = (
        count(WALKER, {"action": space}, *["--configs", "debug"]) for space in (Box(-1, 1, (3,)), Discrete(3))
    )
    assert plain - discrete == (16 + 1) * 3  # a stddev for each of the three means
