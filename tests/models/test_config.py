"""`LoopedConfig` takes what it knows, in the types that it knows, and refuses the rest."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from loop_lens import LoopedConfig

Config: Any = LoopedConfig
OWN = [each for each in fields(LoopedConfig) if each.name in LoopedConfig.__annotations__]
WHOLE = [each.name for each in OWN if str(each.type).startswith("int")]
WRONG = {
    "int": ("3", 3.5, True, [3]),
    "float": ("3", None, True),
    "bool": (1, "yes", None),
    "str": (3, None, b"a"),
}


@pytest.mark.parametrize("name", [each.name for each in OWN])
def test_a_misspelt_option_is_refused_with_the_nearest_name(name: str) -> None:
    middle = len(name) // 2
    with pytest.raises(TypeError, match=r"unexpected keyword argument .*: did you mean '\w+'\?"):
        Config(**{name[:middle] + name[middle + 1 :]: 1})


def test_an_option_that_nothing_resembles_is_refused() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'"):
        Config(**{"zzz": 1})


def test_a_saved_config_may_hold_what_another_version_of_transformers_knows_but_no_misspelt_field() -> None:
    saved = LoopedConfig(recurrences=7).to_dict()
    assert LoopedConfig.from_dict(saved | {"zzz": 1}).recurrences == 7
    saved["recurences"] = saved.pop("recurrences")
    with pytest.raises(TypeError, match=r"did you mean 'recurrences'\?"):
        LoopedConfig.from_dict(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (each.name, value)
        for each in OWN
        for value in WRONG.get(str(each.type).removesuffix(" | None"), ())
        if not (value is None and str(each.type).endswith("None"))
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        Config(**{name: value})


@pytest.mark.parametrize("name", [n for n in WHOLE if not n.endswith("_token_id")])
@pytest.mark.parametrize(
    "brought",
    [np.int64, torch.tensor, np.uint8, lambda n: pd.Series([n]).iloc[0]],
    ids=["int64", "tensor", "uint8", "pandas"],
)
def test_whole_numbers_of_any_kind_are_pythons_own(name: str, brought: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    got = getattr(Config(**{**sizes, name: brought(4)}), name)
    assert got == 4 and type(got) is int
