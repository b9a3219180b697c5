"""Posterior and imagination in Triton's kernels equal the loops, and are machine code for a GPU.

There may be no GPU: what they compute is shown by Triton's interpreter, in a process of its own, as it has to be chosen
before anything imports triton.
"""

import pytest
import torch

from ops.random import drawing_from
from rssm import State
from tests.factories import initial, make_agent, make_batch, run_python, shake
from tools import UserError
from training.machine import check_scan

pytest.importorskip("triton")
SIZES = {"rssm.deter": 18, "rssm.blocks": 2, "rssm.hidden": 6, "rssm.stoch": 3, "rssm.classes": 5, "decoder.blocks": 2}
TINY = [word for key, size in SIZES.items() for word in (f"--{key}", str(size))]


def test_states_gradients_actions_and_an_update_are_those_of_the_loops():
    checks = ["gradients", "imagination", "learning"]
    code = "; ".join(["from tests import test_triton as t", *(f"t.check_{name}()" for name in checks)])
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def observed(rssm, arguments):
    """Return states and gradients of a loss that sees states and logits at every step."""
    states, post = rssm.observe(*arguments)
    generator = torch.Generator().manual_seed(3)
    seen = states.deter, states.stoch, post.logits
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in seen)
    params = {name: x for name, x in rssm.named_parameters() if not name.startswith("prior")}
    grads = torch.autograd.grad(loss, [*arguments[:2], *params.values()])
    return states, dict(zip(["embed", "action", *params], grads, strict=True))


def check_gradients():
    from ops.kernels.observe import observe

    agent = shake(make_agent("proprio", *TINY))  # no size is a power of two
    rssm, (rows, steps) = agent.world.rssm, (2, 3)
    torch.manual_seed(0)
    embed = torch.randn(rows, steps, agent.world.encoder.size, requires_grad=True)
    action = torch.randn(rows, steps, agent.act_spec.size, requires_grad=True)
    first = torch.tensor([[True, False, False], [False, True, False]])
    start = State(torch.randn(rows, 18), torch.eye(5)[torch.randint(5, (rows, 3))])
    arguments = embed, action, first, start, torch.rand(rows, steps, 3)
    expected, gradients = observed(rssm, arguments)
    rssm.kernels = observe
    states, found = observed(rssm, arguments)
    torch.testing.assert_close(states.deter, expected.deter, rtol=1e-5, atol=1e-6)
    assert torch.equal(states.stoch, expected.stoch)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def check_imagination():
    """Numbers and choices of several sizes, from more starts than a program computes, and not a multiple of them."""
    from ops.kernels.imagine import ROWS, Imagine

    agent, count = shake(make_agent("mixed", *TINY, "--rssm.img_layers", "3")), ROWS + 3
    torch.manual_seed(0)
    start = State(torch.randn(1, count, 18), torch.eye(5)[torch.randint(5, (1, count, 3))])
    found = []
    imagine = Imagine(agent.act_spec)
    for kernel in (None, imagine):
        agent.behavior.kernel = kernel
        with drawing_from(torch.Generator().manual_seed(1)):
            found.append(agent.behavior.rollout(agent.world, start))
    loop, kernel = found
    assert torch.equal(kernel.states.stoch, loop.states.stoch)
    assert torch.equal(kernel.actions[..., :8], loop.actions[..., :8])  # choices of 2, 3 and 3; then two numbers
    torch.testing.assert_close(kernel, loop, rtol=1e-5, atol=1e-5)
    assert imagine.places(torch.device("cpu")) is imagine.places(torch.device("cpu"))  # as a recording needs it


def check_learning():
    agents = [make_agent("proprio", *TINY, "--ops.scan", scan) for scan in ("loop", "triton")]
    assert agents[0].world.rssm.kernels is None and agents[1].world.rssm.kernels
    assert agents[0].behavior.kernel is None and agents[1].behavior.kernel
    shake(agents[0])
    agents[1].load_state_dict(agents[0].state_dict())
    found = []
    for agent in agents:
        with drawing_from(torch.Generator().manual_seed(1)):
            states, metrics = agent.update(make_batch("proprio", size=(2, 2)), initial(agent, 2))
        found.append((states, metrics))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--configs", "debug", "dreamerv2"), "--rssm.cell norm_gru_bias, --norm none, --act elu"),
        (("--rssm.dyn_layers", "2", "--rssm.initial", "learned"), "--rssm.dyn_layers 2, --rssm.initial learned"),
        (("--actor.dist", "tanh_normal"), "--actor.dist tanh_normal"),
    ],
)
def test_what_they_do_not_know_is_refused(flags, said):
    with pytest.raises(UserError, match="its kernels do not know") as caught:
        make_agent("proprio", *flags, "--ops.scan", "triton")
    assert said in str(caught.value) and "take --ops.scan loop" in str(caught.value)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ops.kernels import imagine, observe
from ops.kernels.gradient import gradient_kernel
from tests.factories import make_agent

agent = make_agent("mixed", "--rssm.deter", "64", "--rssm.hidden", "16", "--rssm.stoch", "4", "--rssm.classes", "4")
observed = observe.constants(64, 16, 4, 4, 8, 0.01)
imagined = imagine.constants(agent.world.rssm, agent.behavior.actor)
for kernel, sizes, wide in (
    (observe.observe_kernel, observed | {"span": 4096}, ("s_", "noise")),
    (gradient_kernel, observed | {"span": 8192}, ("s_", "on_", "scale_", "back_")),
    (imagine.imagine_kernel, imagined, ("s_", "action", "noise")),
):
    kinds = {name: "*fp32" if name.startswith(wide) else "*bf16" for name in kernel.arg_names}
    kinds |= dict.fromkeys(["begins", "sizes", "drawn", "numbers"], "*i32") if kernel is imagine.imagine_kernel else {}
    kinds |= {"T": "i32", "N": "i32", **dict.fromkeys(sizes, "constexpr")}
    kinds = {name: kinds[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=sizes)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_they_are_machine_code_of_a_gpu_that_is_not_there():
    done = run_python(COMPILE)
    assert done.returncode == 0, done.stderr
    sizes = done.stdout.split()
    assert len(sizes) == 3 and min(map(int, sizes)) > 10_000


def test_without_a_gpu_they_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="need a GPU"):
        check_scan("triton", torch.device("cpu"))
    check_scan("loop", torch.device("cpu"))
    check_scan("triton", torch.device("cuda"))
