"""A pipeline for Hugging Face diffusers. As a command, this file writes a folder that DiffusionPipeline loads by
itself: the two models as alitok_fast writes them (safetensors), model_index.json, and this file as the code.

    pip install diffusers
    python examples/diffusers_pipeline/pipeline.py --model demo --out models/demo
    python examples/diffusers_pipeline/pipeline.py --model alitok_b.bin --tokenizer alitok_tokenizer.pth --out models/b

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("models/demo", trust_remote_code=True)  # the folder holds code: this file
    pipe(["bag", "sandal"], generator=0, num_images_per_prompt=4).images[0].save("bag.png")
"""

import argparse
import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from alitok_fast import Generator, Pipeline, Tokenizer, load_generator, load_tokenizer
from alitok_fast.pipelines.class_names import trained_classes
from alitok_fast.storage.files import write_atomically

NAME = "alitok"  # of this file in a folder; diffusers keeps the code of all folders in one place, by name
SOURCE = Path(__file__).read_text(encoding="utf-8")
OUTPUT_TYPES = ("pil", "np", "pt")


class AliTokTokenizer(torch.nn.Module):
    """How diffusers loads a Tokenizer: it asks a class, and tells a Module's class the dtype."""

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None):
        return load_tokenizer(folder, dtype=torch_dtype or torch.float32)


class AliTokGenerator(torch.nn.Module):
    """The same for a Generator."""

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None):
        return load_generator(folder, dtype=torch_dtype or torch.float32)


class AliTokPipeline(DiffusionPipeline):
    """Class labels in, pictures out. The components are a Tokenizer and a Generator of alitok_fast.

    `to(device)` and `dtype=` are diffusers'. There is no scheduler and no number of steps, and offloading,
    `device_map`, `variant` and the quantization of diffusers are not supported.
    """

    def __init__(self, tokenizer: Tokenizer, generator: Generator):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, generator=generator)
        self._made_of, self._pipeline = None, None

    @property
    def alitok(self):
        """The alitok_fast Pipeline of the components as they are, made anew where one was moved or replaced."""
        parts = (self.tokenizer, self.generator)
        made_of = [(part, part.device, part.dtype) for part in parts]
        if self._made_of != made_of:
            loaded = self.generator.loaded
            names = loaded and loaded.provenance.get("classes")
            classes = trained_classes(names, self.generator.config).names
            self._made_of, self._pipeline = made_of, Pipeline(*parts, classes or None, self.name_or_path or "memory")
        return self._pipeline

    @torch.no_grad()
    def __call__(
        self,
        class_labels,
        guidance_scale=None,
        num_images_per_prompt=1,
        generator=None,
        output_type="pil",
        return_dict=True,
        guidance_power=None,
        temperature=1.0,
        top_k=None,
        top_p=None,
        batch_size=None,
    ):
        """Sample pictures, those of each label one after the other.

        Args:
            class_labels: one class or several, by number or by name.
            guidance_scale: 0 switches guidance off, None takes the model's own. It is not diffusers' scale, where 1 is
                off; docs/sampling.md has the formula.
            num_images_per_prompt: pictures of each label.
            generator: a seed as for `alitok_fast.Pipeline`, or a torch.Generator (`seed_of`); None draws a seed.
            output_type: "pil" (a list), "np" (B, H, W, 3) or "pt" (B, 3, H, W), both float32 in [0, 1]: the same
                pictures of 8 bits.
            return_dict: False returns a tuple.
            guidance_power, temperature, top_k, top_p: as for `alitok_fast.SamplingParams`.
            batch_size: pictures sampled together; None samples all at once.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if type(num_images_per_prompt) is not int or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt: expected an integer from 1 on, got {num_images_per_prompt!r}")
        labels = [label for label in self.alitok.label_ids(class_labels) for _ in range(num_images_per_prompt)]
        samples = self.alitok(
            labels,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            guidance_power=guidance_power,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed_of(generator),
        )
        images = samples.images
        if output_type != "pil":
            images = torch.from_numpy(samples.pixels).float() / 255
            images = images.numpy() if output_type == "np" else images.permute(0, 3, 1, 2)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory, safe_serialization=True):
        """Write a folder that `DiffusionPipeline.from_pretrained` and `alitok_fast.Pipeline.from_pretrained` load."""
        if not safe_serialization:
            raise ValueError("safe_serialization: expected True, got False; pickles are not written")
        folder = Path(save_directory)
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.generator.save_pretrained(folder / "generator")
        for place in (folder, folder / "tokenizer", folder / "generator"):  # diffusers looks beside each component
            write_text(place / f"{NAME}.py", SOURCE)
        index = {
            "_class_name": [NAME, AliTokPipeline.__name__],
            "_diffusers_version": diffusers.__version__,
            "tokenizer": [NAME, AliTokTokenizer.__name__],
            "generator": [NAME, AliTokGenerator.__name__],
        }
        write_text(folder / self.config_name, json.dumps(index, indent=2) + "\n")


def seed_of(generator):
    """The seed that a call takes.

    An integer is the seed itself. A torch.Generator as `manual_seed(n)` leaves it gives n; it moves on, so that the
    next call draws another seed from it. None draws one from torch's default generator.
    """
    if not isinstance(generator, torch.Generator | None):
        return generator  # alitok_fast checks it
    device = generator.device if generator else "cpu"
    state = generator.get_state() if generator else None
    drawn = torch.randint(2**63 - 1, (), generator=generator, device=device).item()
    if generator is None:
        return drawn
    seed = generator.initial_seed()
    fresh = torch.equal(state, torch.Generator(device).manual_seed(seed).get_state())
    return (seed + 2**63) % 2**64 - 2**63 if fresh else drawn


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as for alitok_fast.Pipeline.from_pretrained")
    parser.add_argument("--tokenizer", help="of a released file: the tokenizer's")
    parser.add_argument("--out", required=True, help="the folder")
    args = parser.parse_args()
    models = Pipeline.from_pretrained(args.model, tokenizer=args.tokenizer)
    AliTokPipeline(models.tokenizer, models.generator).save_pretrained(args.out)
