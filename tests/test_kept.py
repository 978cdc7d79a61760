"""What is kept of a block's modules between calls: gone as soon as one of them is changed, whatever changed it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from vitkernels.residual import genuine
from vitkernels.residual.kept import Kept, Late, key_of


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))
        self.norm = nn.BatchNorm1d(4)
        self.factor = nn.Parameter(torch.zeros(1))
        self.rate, self.names, self.config = 0.5, ["a"], SimpleNamespace(mode="sdpa", options={})


def _other_class(tree: Any) -> None:
    tree.norm.__class__ = type("Other", (nn.BatchNorm1d,), {})


CHANGES: dict[str, Callable[[Any], object]] = {
    "train or eval": lambda tree: tree.inner[1].eval(),
    "a hook": lambda tree: tree.inner[0].register_forward_hook(print),
    "a pre-hook": lambda tree: tree.norm.register_forward_pre_hook(print),
    "a hook with keywords": lambda tree: tree.inner[0].register_forward_hook(print, with_kwargs=True, always_call=True),
    "a pre-hook with keywords": lambda tree: tree.norm.register_forward_pre_hook(print, with_kwargs=True),
    "a backward hook": lambda tree: tree.inner.register_full_backward_hook(print),
    "a module": lambda tree: setattr(tree.inner, "0", nn.Linear(4, 4)),
    "a module less": lambda tree: tree.inner.__delitem__(1),
    "a parameter": lambda tree: setattr(tree.inner[0], "weight", nn.Parameter(torch.zeros(4, 4))),
    "a parameter of one element, the same number": lambda tree: setattr(tree, "factor", nn.Parameter(torch.zeros(1))),
    "no bias": lambda tree: setattr(tree.inner[0], "bias", None),
    "a buffer": lambda tree: setattr(tree.norm, "running_mean", torch.ones(4)),
    "an attribute": lambda tree: setattr(tree, "rate", 0.25),
    "one more attribute": lambda tree: setattr(tree, "gate", 1),
    "a list": lambda tree: tree.names.append("b"),
    "a configuration": lambda tree: setattr(tree.config, "mode", "eager"),
    "a dictionary of it": lambda tree: tree.config.options.update(a=1),
    "a forward": lambda tree: setattr(tree.inner[0], "forward", lambda x: x),
    "a class": _other_class,
    "a parametrization": lambda tree: parametrizations.weight_norm(tree.inner[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    tree, kept = Tree(), Kept()
    read = iter(range(10))
    assert [kept.get(tree, None, lambda: next(read)) for _ in range(3)] == [0, 0, 0]
    CHANGES[change](tree)
    assert [kept.get(tree, None, lambda: next(read)) for _ in range(3)] == [1, 1, 1], change


def test_a_forward_that_replaces_a_classs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, kept = Tree(), Kept()
    assert kept.get(tree, None, lambda: 0) == 0
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    assert kept.get(tree, None, lambda: 1) == 1


def test_a_forward_that_replaces_what_a_fused_class_stands_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twin(nn.Dropout):
        stock = nn.Dropout

        def forward(self, input: Tensor) -> Tensor:
            return input

    tree, kept = nn.Sequential(Twin()), Kept()
    assert kept.get(tree, None, lambda: 0) == 0
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: 2 * x)
    assert kept.get(tree, None, lambda: 1) == 1


def test_a_hook_that_may_do_something_in_the_next_call_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, kept, idle = Tree(), Kept(), [True]
    monkeypatch.setattr(genuine, "IDLE_HOOKS", [lambda hook: idle[0]])
    tree.inner[0].register_forward_hook(print)
    read = iter(range(10))
    answers = []
    for each in (True, True, False, False, True):
        idle[0] = each
        answers.append(kept.get(tree, None, lambda: next(read)))
    assert answers == [0, 0, 1, 1, 2]


def test_weights_that_learn_are_no_change() -> None:
    tree, kept = Tree(), Kept()
    assert kept.get(tree, None, lambda: 0) == 0
    with torch.no_grad():
        tree.inner[0].weight.add_(1)
    tree.inner[0].weight.grad = torch.zeros(4, 4)
    tree.inner.double()
    assert kept.get(tree, None, lambda: 1) == 0, "a parameter that is moved is the same one: its users look at it"


def test_hooks_of_state_dicts_are_no_change() -> None:
    tree, kept = Tree(), Kept()
    assert kept.get(tree, None, lambda: 0) == 0
    tree.register_state_dict_pre_hook(print)
    tree.inner[0].register_load_state_dict_post_hook(print)
    assert kept.get(tree, None, lambda: 1) == 0


def test_keys_and_trees_are_told_apart() -> None:
    tree, other, kept = Tree(), Tree(), Kept()
    assert kept.get(tree, ("a", 1), lambda: 0) == 0
    assert kept.get(tree, ("a", 2), lambda: 1) == 1
    assert kept.get(other, ("a", 2), lambda: 2) == 2
    assert kept.get(tree, ("a", 2), lambda: 3) == 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_holds_nothing_of_its_model(copied: Callable[[Any], Any]) -> None:
    tree = Tree()
    tree.kept = Kept()
    assert tree.kept.get(tree, None, lambda: 0) == 0
    twin = copied(tree)
    assert twin.kept.get(twin, None, lambda: 1) == 1
    assert twin.kept.get(twin, None, lambda: 2) == 1


def test_a_tree_that_changes_at_each_call_is_not_compared_for_ever() -> None:
    tree, kept = Tree(), Kept()
    for index in range(100):
        tree.rate = index
        assert kept.get(tree, None, lambda index=index: index) == index  # type: ignore[misc]
    assert kept._found is not None
    assert kept._found[3] < 40


def test_keys_of_options() -> None:
    """Of tensors what decides how modules are read, and nothing that holds them."""
    assert key_of({"mask": None, "causal": False}) == (("mask", type(None), None), ("causal", bool, False))
    assert key_of({"options": {"a": 1}}) == (("options", dict, (("a", int, 1),)),) != key_of({"options": {"a": True}})
    mask = key_of({"mask": torch.zeros(2, 3)})
    assert type(mask) is Late
    assert mask == key_of({"mask": torch.ones(4, 5)}) != key_of({"mask": torch.zeros(2)})
    assert mask not in (
        key_of({"mask": torch.zeros(2, 3).bool()}),
        key_of({"mask": torch.zeros(2, 3).requires_grad_()}),
    )
    inside = key_of({"options": {"positions": (torch.zeros(1), 1)}})
    assert type(inside) is Late
    assert inside != key_of({"options": {"positions": (torch.zeros(1), True)}})
    assert key_of({"mask": nn.Parameter(torch.zeros(1))}) is None
    assert key_of({"mask": object()}) is None
