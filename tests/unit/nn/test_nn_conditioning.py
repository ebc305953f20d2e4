from __future__ import annotations

import pytest
import torch

from tubelet.nn.conditioning import AdaLN, NoiseEmbedding, gated, modulate, token_sigma


def test_sigma_per_run_of_tokens() -> None:
    patch = (2, 2, 2)
    assert token_sigma(torch.tensor(0.3), 2, patch).flatten().tolist() == pytest.approx([0.3, 0.3])
    assert token_sigma(torch.tensor([0.1, 0.9]), 2, patch).flatten().tolist() == pytest.approx([0.1, 0.9])
    frames = token_sigma(torch.tensor([[0.0, 0.2, 0.4, 1.0, 0.0]]), 1, patch)
    assert frames.flatten().tolist() == pytest.approx([0.0, 0.3, 0.5])
    cells = torch.zeros(1, 1, 2, 4)
    cells[..., 2:] = torch.tensor([[0.0, 0.4], [0.8, 0.4]])
    assert token_sigma(cells, 1, patch).flatten().tolist() == pytest.approx([0.0, 0.4])


def test_sigma_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match="sigma is"):
        token_sigma(torch.zeros(1, 2, 3), 1, (1, 2, 2))


def test_noise_levels_are_told_apart() -> None:
    torch.manual_seed(0)
    out = NoiseEmbedding(32)(torch.linspace(0, 1, 50))
    assert torch.cdist(out, out).add(torch.eye(50) * 9).min() > 1e-3


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_modulation_in_runs_equals_modulation_per_token(groups: int) -> None:
    x, update, shift, scale = torch.randn(2, 12, 8), torch.randn(2, 12, 8), torch.randn(2, groups, 8), torch.randn(2, groups, 8)
    a, b = (m.repeat_interleave(12 // groups, dim=1) for m in (shift, scale))
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + b) + a)
    torch.testing.assert_close(gated(x, shift, update), x + a * update)


def test_adaln_is_float32_whatever_the_weights() -> None:
    assert AdaLN(8, 6).bfloat16()(torch.randn(2, 1, 8).bfloat16()).dtype == torch.float32
