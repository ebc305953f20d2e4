from __future__ import annotations

import pytest
import torch

from tubelet.nn.blocks import SpacetimeBlock, swiglu_width
from tubelet.nn.mlp import MLP, SwiGLU
from tubelet.nn.norms import RMSNorm
from tubelet.nn.positions import RotaryEmbedding, grid_positions


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_matches_its_equation(affine: bool) -> None:
    norm, x = RMSNorm(12, affine=affine), torch.randn(3, 5, 12).double() * 4
    gain = torch.linspace(0.5, 2, 12).double() if affine else torch.ones(12).double()
    if norm.weight is not None:
        norm.weight.data = gain.float()
        gain = norm.weight.detach().double()
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * gain)
    assert norm(torch.zeros(1, 12)).eq(0).all()
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_mlps_match_their_equations() -> None:
    x = torch.randn(2, 8)
    glu, mlp = SwiGLU(8, 6), MLP(8, 6, approximate="tanh")
    gate, up = glu.gate_up.weight[:6], glu.gate_up.weight[6:]
    torch.testing.assert_close(glu(x), (x @ gate.T * (x @ gate.T).sigmoid() * (x @ up.T)) @ glu.down.weight.T)
    h = torch.nn.functional.gelu(x @ mlp.up.weight.T + mlp.up.bias, approximate="tanh")
    torch.testing.assert_close(mlp(x), h @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize(("dim", "hidden"), [(16, 64), (256, 704), (384, 1024), (768, 2048), (1024, 2752), (1152, 3072)])
def test_swiglu_width(dim: int, hidden: int) -> None:
    assert swiglu_width(dim) == hidden


@pytest.mark.parametrize("cross", [True, False])
def test_block_has_no_biases_and_closed_gates_make_it_the_identity(cross: bool) -> None:
    block = SpacetimeBlock(32, 2, cross=cross)
    assert [name for name, _ in block.named_parameters() if name.endswith("bias")] == []
    if block.cross is not None:
        torch.nn.init.zeros_(block.cross.out.weight)
    x, rope = torch.randn(2, 6, 32), RotaryEmbedding((4, 6, 6))(grid_positions(1, 2, 3))
    text = torch.randn(2, 3, 32) if cross else None
    assert torch.equal(block(x, torch.zeros(2, 1, 192), rope, text), x)


def test_sequence_mask_hides_tokens_from_self_attention() -> None:
    torch.manual_seed(0)
    block = SpacetimeBlock(32, 2, cross=False)
    torch.nn.init.normal_(block.modulation)
    x, rope, modulation = torch.randn(1, 6, 32), RotaryEmbedding((4, 6, 6))(grid_positions(1, 2, 3)), torch.randn(1, 1, 192)
    mask = torch.tensor([[False, False, True, True, True, True]])
    out = block(x, modulation, rope, None, mask)
    other = block(torch.cat([torch.randn(1, 2, 32), x[:, 2:]], dim=1), modulation, rope, None, mask)
    torch.testing.assert_close(out[:, 2:], other[:, 2:])
    assert not torch.allclose(out, block(x, modulation, rope))
