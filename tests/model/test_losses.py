from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # its name everywhere

from nvila.errors import ConfigError
from nvila.losses import SoftTargets, chunked_cross_entropy, head_cross_entropy

Reduction = str
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (23, 16), a head (50, 16) and targets of which five are ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(shape, generator=generator) for shape in ((23, 16), (50, 16)))
    targets = torch.randint(50, (23,), generator=generator)
    targets[[0, 4, 5, 17, 22]] = -100
    return hidden, weight, targets


def soft_targets() -> SoftTargets:
    """Three ids, in no order, that share probability."""
    return SoftTargets(
        torch.tensor([7, 3, 40]), torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.0, 0.5, 0.5]])
    )


def with_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a loss and its gradients; rows get different weights, so that no mix-up of rows goes unseen."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, targets)
    (value * torch.linspace(0.5, 2, value.numel()).reshape(value.shape)).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 6, 18, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_chunks_change_neither_loss_nor_gradients(
    reduction: Reduction, chunk_tokens: int | None, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    found = with_gradients(
        lambda h, w, t: chunked_cross_entropy(h, w, t, chunk_tokens=chunk_tokens, reduction=reduction),  # type: ignore[arg-type]  # one of the three
        *batch,
    )
    expected = with_gradients(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction=reduction), *batch)
    for mine, plain in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("chunk_tokens", [5, 1000])
def test_soft_targets_are_a_cross_entropy_with_probabilities(
    reduction: Reduction, chunk_tokens: int, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, targets = batch
    targets[[1, 2, 9, 20]] = torch.tensor([7, 3, 40, 7])
    soft = soft_targets()

    def dense(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        """The same by torch's own cross entropy with a full row of probabilities for every token."""
        keep = t != -100
        rows = F.one_hot(t[keep], 50).float()
        for index, id_ in enumerate(soft.ids.tolist()):
            rows[t[keep] == id_] = torch.zeros(50).scatter(0, soft.ids, soft.weights[index])
        nll = torch.zeros(len(t)).masked_scatter(keep, F.cross_entropy(h[keep] @ w.T, rows, reduction="none"))
        return {"none": nll, "sum": nll.sum(), "mean": nll.sum() / keep.sum()}[reduction]

    found = with_gradients(
        lambda h, w, t: chunked_cross_entropy(h, w, t, chunk_tokens=chunk_tokens, reduction=reduction, soft=soft),  # type: ignore[arg-type]  # one of the three
        hidden,
        weight,
        targets,
    )
    for mine, plain in zip(found, with_gradients(dense, hidden, weight, targets), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [3, 1000])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_bfloat16_loses_no_more_than_the_plain_loss_does(
    reduction: Reduction, chunk_tokens: int, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, targets = batch[0].bfloat16(), batch[1].bfloat16(), batch[2]
    found = with_gradients(
        lambda h, w, t: chunked_cross_entropy(h, w, t, chunk_tokens=chunk_tokens, reduction=reduction),  # type: ignore[arg-type]  # one of the three
        hidden,
        weight,
        targets,
    )
    exact = with_gradients(
        lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction=reduction), hidden.float(), weight.float(), targets
    )
    plain = with_gradients(
        lambda h, w, t: F.cross_entropy((h @ w.T).float(), t, reduction=reduction), hidden, weight, targets
    )
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for mine, true, theirs in zip(found, exact, plain, strict=True):
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm() + 1e-6


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_under_autocast_the_products_are_those_of_a_linear_layer(
    reduction: Reduction, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    def under_autocast(loss: Loss) -> Loss:
        def run(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss(h, w, t)

        return run

    found = with_gradients(
        under_autocast(lambda h, w, t: chunked_cross_entropy(h, w, t, chunk_tokens=4, reduction=reduction)),  # type: ignore[arg-type]  # one of the three
        *batch,
    )
    expected = with_gradients(
        under_autocast(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t, reduction=reduction)), *batch
    )
    assert [tensor.dtype for tensor in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for mine, plain in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_frozen_side_gets_no_gradient(
    reduction: Reduction, frozen: int, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    sides = [batch[0].clone().requires_grad_(), batch[1].clone().requires_grad_()]
    sides[frozen].requires_grad_(False)
    chunked_cross_entropy(*sides, batch[2], chunk_tokens=4, reduction=reduction).sum().backward()  # type: ignore[arg-type, misc]  # one of the three; two sides
    assert sides[frozen].grad is None
    whole = [batch[0].clone().requires_grad_(), batch[1].clone().requires_grad_()]
    F.cross_entropy(whole[0] @ whole[1].T, batch[2], reduction="sum").backward()
    torch.testing.assert_close(sides[1 - frozen].grad, whole[1 - frozen].grad, rtol=1e-5, atol=1e-5)


def test_no_supervised_row_is_a_loss_of_zero_with_gradients_of_zero(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    ignored = torch.full((23,), -100)
    value, by_hidden, by_weight = with_gradients(chunked_cross_entropy, batch[0], batch[1], ignored)
    assert float(value) == 0
    assert not by_hidden.any()
    assert not by_weight.any()
    assert chunked_cross_entropy(*batch[:2], ignored, reduction="none").tolist() == [0.0] * 23
    head, hidden = nn.Linear(16, 50), batch[0].clone().requires_grad_()
    head_cross_entropy(head, hidden, ignored).backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_another_ignore_index_is_honoured(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets = batch
    expected = F.cross_entropy(hidden @ weight.T, targets)
    found = chunked_cross_entropy(hidden, weight, targets.where(targets != -100, 49 - 50), ignore_index=-1)
    torch.testing.assert_close(found, expected)


def test_a_second_backward_pass_fails_rather_than_scaling_twice(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden = batch[0].requires_grad_()
    loss = chunked_cross_entropy(hidden, *batch[1:])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_without_gradients_none_are_made(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight = batch[0].requires_grad_(), batch[1].requires_grad_()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, batch[2], chunk_tokens=4)
    assert loss.grad_fn is None


class _Scaled(nn.Linear):
    """A head that is more than its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def _hooked() -> nn.Linear:
    head = nn.Linear(16, 50, bias=False)
    head.register_forward_hook(lambda module, args, output: output * 2)
    return head


def _fed() -> nn.Linear:
    head = nn.Linear(16, 50, bias=False)
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return head


def _offloaded() -> nn.Linear:
    """A head as accelerate leaves it: its own forward, and a mark."""
    head = nn.Linear(16, 50, bias=False)
    head._hf_hook = object()  # type: ignore[assignment]  # not a module, as there
    head.forward = lambda hidden: 2 * F.linear(hidden, head.weight)  # type: ignore[assignment, method-assign]  # as there
    return head


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(16, 50, bias=False),
        lambda: nn.Linear(16, 50),
        lambda: _Scaled(16, 50, bias=False),
        _hooked,
        _fed,
        _offloaded,
        lambda: nn.Sequential(nn.Linear(16, 50)),
    ],
    ids=["plain", "bias", "subclass", "hook behind", "hook before", "offloaded", "no weight"],
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_any_head_gives_the_loss_of_its_own_logits(
    make: Callable[[], nn.Module], reduction: Reduction, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    head = make()
    hidden, targets = batch[0].clone().requires_grad_(), batch[2]
    results = []
    for loss in (
        head_cross_entropy(head, hidden, targets, chunk_tokens=4, reduction=reduction),  # type: ignore[arg-type]  # one of the three
        F.cross_entropy(head(hidden), targets, reduction=reduction),
    ):
        parameters = list(head.parameters())
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), [hidden, *parameters])])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 50, bias=False), lambda: nn.Linear(16, 50)])
def test_soft_targets_reach_every_kind_of_head(
    make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    head, targets = make(), torch.full((23,), 7)
    logits = head(batch[0]).log_softmax(1)
    expected = -(logits[:, [7, 3, 40]] @ torch.tensor([0.5, 0.25, 0.25])).mean()
    found = head_cross_entropy(head, batch[0], targets, soft=soft_targets())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"reduction": "avg"}, r"'avg'.*none, mean, sum"), ({"chunk_tokens": 0}, r"chunk_tokens is 0.*1 or more")],
)
@pytest.mark.parametrize("bias", [False, True])
def test_wrong_settings_are_named(
    arguments: dict[str, int], message: str, bias: bool, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    with pytest.raises(ConfigError, match=message):
        head_cross_entropy(nn.Linear(16, 50, bias=bias), batch[0], batch[2], **arguments)  # type: ignore[arg-type]  # wrong


class _LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's protocol
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("bias", [False, True])
def test_no_tensor_is_ever_as_large_as_the_logits(reduction: Reduction, bias: bool) -> None:
    head, hidden = nn.Linear(4, 50, bias=bias), torch.randn(200, 4, requires_grad=True)
    with _LargestAllocation() as watch:  # type: ignore[no-untyped-call]  # as torch leaves it
        loss = head_cross_entropy(head, hidden, torch.arange(200) % 50, chunk_tokens=20, reduction=reduction)  # type: ignore[arg-type]  # one of the three
        loss.sum().backward()
    assert watch.largest == 20 * 50  # a chunk, never the 200 * 50 of all tokens
