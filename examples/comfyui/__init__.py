"""Nodes for ComfyUI: load a model, sample pictures of a class, and take pictures through a tokenizer and back. The file
imports nothing of ComfyUI. Install alitok_fast into ComfyUI's Python, and copy the folder under a name of its own:

    pip install .
    cp -r examples/comfyui COMFYUI/custom_nodes/alitok
"""

import numpy as np
import torch

SEEDS = 2**63
DEVICES, DTYPES = ["cpu", "cuda"], ["float32", "bfloat16", "float16"]
LOADING = {"device": (DEVICES,), "dtype": (DTYPES,)}


class LoadModel:
    """A model that samples, and its tokenizer."""

    CATEGORY, FUNCTION = "alitok", "load"
    RETURN_TYPES, RETURN_NAMES = ("ALITOK_PIPELINE", "ALITOK_TOKENIZER"), ("pipeline", "tokenizer")

    @classmethod
    def INPUT_TYPES(cls):
        names = {"model": ("STRING", {"default": "demo"})}
        return {"required": {**names, **LOADING}, "optional": {"tokenizer": ("STRING", {"default": ""})}}

    def load(self, model, device, dtype, tokenizer=""):
        """`tokenizer`: the tokenizer's file, where `model` is a released file."""
        from alitok_fast import Pipeline

        pipe = Pipeline.from_pretrained(model, device, getattr(torch, dtype), tokenizer or None)
        return pipe, pipe.tokenizer


class LoadTokenizer:
    """A tokenizer alone, such as the one for photographs that ships with alitok_fast."""

    CATEGORY, FUNCTION = "alitok", "load"
    RETURN_TYPES, RETURN_NAMES = ("ALITOK_TOKENIZER",), ("tokenizer",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"tokenizer": ("STRING", {"default": "photos-64"}), **LOADING}}

    def load(self, tokenizer, device, dtype):
        from alitok_fast import load_tokenizer

        return (load_tokenizer(tokenizer, device, getattr(torch, dtype)),)


class Sample:
    """Pictures of one class."""

    CATEGORY, FUNCTION = "alitok", "sample"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pipeline": ("ALITOK_PIPELINE",),
                "label": ("STRING", {"default": "0", "tooltip": "A class by name or number."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": SEEDS - 1, "control_after_generate": True}),
                "count": ("INT", {"default": 1, "min": 1, "max": 1024}),
                "guidance_scale": (
                    "FLOAT",
                    {
                        "default": -1.0,
                        "min": -1.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "0: off; -1: the model's own.",
                    },
                ),
                "temperature": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}),
                "top_k": ("INT", {"default": 0, "min": 0, "max": 1 << 20, "tooltip": "0: all."}),
                "top_p": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            }
        }

    def sample(self, pipeline, label, seed, count, guidance_scale, temperature, top_k, top_p):
        samples = pipeline(
            [label] * count,
            seed=seed,
            guidance_scale=None if guidance_scale == -1 else guidance_scale,
            temperature=temperature,
            top_k=top_k or None,
            top_p=top_p,
        )
        return (floats(samples.pixels),)


class Reconstruct:
    """Pictures through the tokenizer and back: its crop in the middle, or in tiles the whole picture."""

    CATEGORY, FUNCTION = "alitok", "reconstruct"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "IMAGE"), ("original", "reconstruction")

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"tokenizer": ("ALITOK_TOKENIZER",), "image": ("IMAGE",), "tile": ("BOOLEAN", {"default": True})}
        return {"required": kinds}

    def reconstruct(self, tokenizer, image, tile):
        from alitok_fast.pipelines.reconstruction import reconstruct

        photos = (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        results = [reconstruct(tokenizer, photo, tile) for photo in photos]
        return floats(np.stack([r.original for r in results])), floats(np.stack([r.image for r in results]))


def floats(pixels):
    """(B, H, W, 3) uint8 as ComfyUI's IMAGE: float32 in [0, 1]."""
    return torch.from_numpy(pixels).float() / 255


NODE_CLASS_MAPPINGS = {
    "AliTokLoadModel": LoadModel,
    "AliTokLoadTokenizer": LoadTokenizer,
    "AliTokSample": Sample,
    "AliTokReconstruct": Reconstruct,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AliTokLoadModel": "AliTok: load model",
    "AliTokLoadTokenizer": "AliTok: load tokenizer",
    "AliTokSample": "AliTok: sample a class",
    "AliTokReconstruct": "AliTok: reconstruct",
}
