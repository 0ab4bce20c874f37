import pytest
import torch

from latentdiff.models.unet import UNet


@pytest.mark.slow
def test_the_u_net_compiles_as_one_graph_and_keeps_its_names() -> None:
    torch.manual_seed(0)
    unet = UNet.from_config(
        {
            "sample_size": 8,
            "block_out_channels": (8, 8),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
        }
    )
    x_t, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 5, 12)
    names, plain = list(unet.state_dict()), unet(x_t, t, context)
    plain.square().mean().backward()
    gradients = [p.grad.clone() for p in unet.parameters() if p.grad is not None]
    unet.zero_grad()
    # The eager backend runs the captured graph as it is: what is tested is that there is only one.
    unet.compile(backend="eager", fullgraph=True)
    compiled = unet(x_t, t, context)
    compiled.square().mean().backward()
    assert list(unet.state_dict()) == names
    torch.testing.assert_close(compiled, plain)
    found = [p.grad for p in unet.parameters() if p.grad is not None]
    torch.testing.assert_close(found, gradients)
