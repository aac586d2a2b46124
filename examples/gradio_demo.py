"""A page in the browser: samples of a class with their settings, and photographs through a tokenizer and back. It
listens on this machine alone, has no share link, and sends Gradio no statistics.

    pip install gradio
    python examples/gradio_demo.py --model demo --tokenizer photos-64 --port 7860
"""

import argparse

import gradio as gr

from alitok_fast import Pipeline, load_tokenizer
from alitok_fast.pipelines.reconstruction import reconstruct


def page(model, tokenizer):
    pipe, coder = Pipeline.from_pretrained(model), load_tokenizer(tokenizer)
    config, quiet = pipe.generator.config, {"analytics_enabled": False, "flagging_mode": "never"}

    def sample(label, seed, guidance_scale, temperature, top_k, top_p, count):
        settings = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}
        return pipe([label] * count, seed=seed, guidance_scale=guidance_scale, **settings).images

    def photograph(photo, tile):
        result = reconstruct(coder, photo, tile)
        return result.original, result.image, f"{result.psnr:.2f} dB, {result.tokens.numel()} tokens"

    label = gr.Dropdown([(name, number) for number, name in enumerate(pipe.classes)], value=0, label="Class")
    guidance = gr.Slider(0, max(20, config.guidance_scale), config.guidance_scale, label="Guidance (0: off)")
    top_k = gr.Slider(0, config.codebook_size, 0, step=1, label="Top-k (0: all)")
    sliders = [guidance, gr.Slider(0, 2, 1, label="Temperature"), top_k, gr.Slider(0.01, 1, 1, label="Top-p")]
    settings = [label, gr.Number(0, precision=0, label="Seed"), *sliders, gr.Slider(1, 64, 8, step=1, label="Images")]
    samples = gr.Interface(sample, settings, gr.Gallery(format="png", columns=8), api_name="sample", **quiet)
    inputs = [gr.Image(label="Photograph"), gr.Checkbox(True, label="At its resolution, in tiles")]
    outputs = [*(gr.Image(label=name, format="png") for name in ("As cropped", "Came back")), gr.Textbox(label="PSNR")]
    photos = gr.Interface(photograph, inputs, outputs, api_name="reconstruct", **quiet)
    return gr.TabbedInterface([samples, photos], ["Sample", "Reconstruct"], "AliTok", analytics_enabled=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as for alitok_fast.Pipeline.from_pretrained")
    parser.add_argument("--tokenizer", default="photos-64", help="for photographs: as for alitok_fast.load_tokenizer")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    shown = page(args.model, args.tokenizer)
    shown.launch(server_name="127.0.0.1", server_port=args.port, share=False, show_error=True)
