from __future__ import annotations

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.nn.ids import check_ids


def test_ids_inside_of_the_table_pass() -> None:
    check_ids("labels", torch.tensor([0, 3]), 4)
    check_ids("tokens", torch.tensor([[-1, 3]]), 4, least=-1)
    check_ids("labels", torch.empty(0, dtype=torch.long), 4)
    check_ids("labels", torch.empty(2, dtype=torch.long, device="meta"), 4)


@pytest.mark.parametrize(("ids", "least", "wrong"), [([0, 4], 0, 4), ([-1, 2], 0, -1), ([-2, 9], -1, -2)])
def test_ids_outside_of_the_table_are_named(ids: list[int], least: int, wrong: int) -> None:
    with pytest.raises(UserError, match=f"labels are from {least} to 3, got {wrong}; "):
        check_ids("labels", torch.tensor(ids), 4, least)
