"""MLX's affine 4-bit quantization in torch, so that training can see the weights as they will be shipped"""

import torch

BITS, GROUP_SIZE = 4, 64


def affine(w):
    """w: [groups, 64]; the values after quantizing and dequantizing, as `mx.quantize` of bfloat16 weights does it"""
    w = w.bfloat16().float()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    levels = 2**BITS - 1
    # The end of the range with the larger magnitude becomes the bias, and zero falls on a level exactly.
    from_low = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp_min(1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = torch.round(edge / scale)
    some = steps != 0
    scale = torch.where(some, edge / torch.where(some, steps, 1.0), scale)
    bias = torch.where(some, edge, 0.0)
    q = torch.round((w - bias) / scale).clamp(0, levels)
    return q * scale.bfloat16().float() + bias.bfloat16().float()


def fake_quantized(weights):
    """the matrices of `weights` with quantized values and the gradient passed straight through"""
    names = [name for name, w in weights.items() if w.dim() == 2]
    groups = torch.cat([weights[name].reshape(-1, GROUP_SIZE) for name in names])
    groups = groups + (affine(groups.detach()) - groups.detach())
    parts = groups.split([weights[name].numel() // GROUP_SIZE for name in names])
    return {**weights, **{name: part.view_as(weights[name]) for name, part in zip(names, parts)}}
