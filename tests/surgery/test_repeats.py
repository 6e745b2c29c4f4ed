"""Operations on fake tensors that are made from what is known of the first time: each is beside torch's own answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from stillroom.surgery import repeats
from stillroom.surgery.skeleton import Answered

ASKED: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x * 2 + 1,
    "of another type": lambda x: (x * 2.5).to(torch.float16) @ torch.ones(6, 5, dtype=torch.float16),
    "whole or not": lambda x: (x.to(torch.int64) * 2, x.to(torch.int64) * 2.0),
    "views": lambda x: (x.view(3, 8)[1:], x.transpose(0, 1), x.expand(2, 4, 6), x.detach(), x.view(torch.int32)),
    "parts": lambda x: (x.chunk(3, 1), x.unbind(0), torch.split(x, [1, 3])),
    "several": lambda x: (torch.max(x, 1), F.layer_norm(x, (6,)), x.topk(2)),
    "in place": lambda x: (x.add_(1), x[1].mul_(2), torch._foreach_mul_([x, x], 2.0), x),
    "strides": lambda x: (x.t() + 1, x.t().contiguous(), torch.cat([x, x], 1), F.conv1d(x[None], torch.ones(4, 4, 3))),
    "attention": lambda x: F.scaled_dot_product_attention(*(x.view(1, 2, 2, 6),) * 3),
    "turned in place": lambda x: (x.clone().t_(), x.clone().t_() + 1, x.clone().unsqueeze_(0) + 1),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 3, 2)) * 1j),
}


def look(made: Any, given: Tensor) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    storages = [given.untyped_storage()._cdata, *(leaf.untyped_storage()._cdata for leaf in leaves)]
    return [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.storage_offset(), leaf.device, leaf.untyped_storage().nbytes(),
         leaf is given, storages.index(leaf.untyped_storage()._cdata))
        for leaf in leaves
    ]  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_the_like_is_what_torch_makes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_KNOWN", {})
    with FakeTensorMode():
        given = torch.empty(4, 6)
        right = look(ASKED[name](given), given)
        with Answered():
            for _ in range(2):
                made = ASKED[name](given)
                assert look(made, given) == right
                assert all(isinstance(leaf, FakeTensor) for leaf in tree_leaves(made) if isinstance(leaf, Tensor))


def test_what_was_made_is_made_again_for_others_of_its_kind_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_KNOWN", {})
    with FakeTensorMode(), Answered():
        for rows in (3, 5):
            x = torch.empty(rows, 2, requires_grad=True)
            y = (x @ x.t()).sum(0)
            y.sum().backward()
            assert y.shape == (rows,)
            assert x.grad is not None
            assert x.grad.shape == (rows, 2)
        first, second = torch.empty(3, 2), torch.empty(3, 2)
        views = [x.view(6) for x in (first, second)]
    assert views[0].untyped_storage()._cdata == first.untyped_storage()._cdata
    assert views[1].untyped_storage()._cdata == second.untyped_storage()._cdata
