"""Make a Mixture-of-Experts model of SmolLM2 by carving: write `carving.safetensors`.

    python -m examples.smollm2_moe.recipe  # 70 minutes on 2 cores: 10 layer by layer, 60 end to end
    python -m examples.smollm2_moe.recipe --start examples/smollm2_moe/carving.safetensors  # 60 more end to end

First layer by layer: neurons are grouped by what they do for the learned text, the router learns which experts keep
most of a token, then router and scales learn to give what the dense layer gives. Then end to end: they and the
normalisations learn the dense model's distribution of the next token, by KL divergence. All along, routers pay for
using some experts more than others.

Learns from the conversations of `chats.py`, and from the kinds `manual` and `dictionary` of the example model's
calibration text. The kind `scripture` is held out.
"""

import copy
import random
import time
from pathlib import Path
from typing import Annotated, cast

import pyarrow.parquet as pq
import torch
import typer
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from examples.smollm2_moe.assemble import CARVINGS, TOP_K
from examples.smollm2_moe.carving import CarvedFeedForward, Carving, Shape, carve, load_carvings, save_carvings
from examples.smollm2_moe.dense import decoder_layers, dense_model
from examples.smollm2_moe.questions import CALIBRATION as CHATS
from examples.tiny_moe.data import CALIBRATION
from examples.tiny_moe.train import learning_rate

LENGTH = 256  # tokens of a sequence
LEARNED_KINDS = ("manual", "dictionary")
ROUTER_TEMPERATURE = 0.25  # of what the router first learned: the experts that it chooses begin with like weights
CHUNK = 2048  # tokens of a step of a layer
PEAK = 2e-3  # learning rate end to end
# What imbalance costs: of a layer's relative error, and of the KL divergence (for each layer). With less of it, batches
# would run far fewer experts than those of other models do.
BALANCE, BALANCE_END_TO_END = 0.02, 0.004
SAVE_SECONDS = 600


def sequences(tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Returns token ids [sequences, LENGTH] of all texts in a random order, one after the other."""
    texts = pq.read_table(CHATS).column("text").to_pylist()
    for row in pq.read_table(CALIBRATION).to_pylist():
        if row["kind"] in LEARNED_KINDS:
            texts.append(tokenizer.bos_token + row["text"] + tokenizer.eos_token)
    random.Random(seed).shuffle(texts)
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False).input_ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).unflatten(0, (-1, LENGTH))


@torch.no_grad()
def feed_forward_inputs(model: LlamaForCausalLM, ids: torch.Tensor, batch: int = 8) -> list[torch.Tensor]:
    """Returns what the feed-forward part of each layer gets [T, H], as bfloat16 because it is much."""
    inputs: list[list[torch.Tensor]] = [[] for _ in decoder_layers(model)]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _mlp, args, kept=kept: kept.append(args[0].flatten(0, 1).bfloat16()))
        for layer, kept in zip(decoder_layers(model), inputs, strict=True)
    ]
    for rows in tqdm(ids.split(batch), desc="inputs of all layers"):
        with torch.autocast("cpu", torch.bfloat16):
            model.model(rows)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in inputs]


def chunks(tokens: int, epochs: int) -> list[torch.Tensor]:
    return [rows for _ in range(epochs) for rows in torch.randperm(tokens).split(CHUNK)]


def teach_router(layer: CarvedFeedForward, inputs_TH: torch.Tensor, best_TB: torch.Tensor, epochs: int) -> None:
    """Teaches the router which experts keep most of a token, each expert for itself."""
    optimizer = torch.optim.AdamW([layer.router_EH], lr=3e-3, weight_decay=0.0)
    for rows in chunks(len(inputs_TH), epochs):
        wanted_TE = one_hot(best_TB[rows], len(layer.router_EH)).sum(1).float()
        loss = binary_cross_entropy_with_logits(inputs_TH[rows].float() @ layer.router_EH.T, wanted_TE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.router_EH.data *= ROUTER_TEMPERATURE


def distil(layer: CarvedFeedForward, inputs_TH: torch.Tensor, epochs: int) -> None:
    """Teaches router and scales to give what the dense layer gives."""
    optimizer = torch.optim.AdamW(layer.trained(), lr=3e-3, weight_decay=0.0)
    steps = chunks(len(inputs_TH), epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(steps), pct_start=0.1)
    for rows in steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer.error(inputs_TH[rows]) + BALANCE * layer.imbalance
        loss.backward()
        optimizer.step()
        schedule.step()


def carve_layer_by_layer(
    model: LlamaForCausalLM, ids: torch.Tensor, held_out: torch.Tensor, shape: Shape, epochs: int
) -> list[Carving]:
    """Returns the carving of each layer, trained by itself. Shows its error on held-out text, then with training."""
    carvings = []
    held_out_inputs = feed_forward_inputs(model, held_out)
    for number, inputs_TH in enumerate(feed_forward_inputs(model, ids)):
        decoder_layer = decoder_layers(model)[number]
        with torch.no_grad():
            carving, best_TB = carve(decoder_layer, inputs_TH.float(), shape)
        layer = CarvedFeedForward(decoder_layer.mlp, carving, TOP_K)
        teach_router(layer, inputs_TH, best_TB, epochs)
        with torch.no_grad():
            before = float(layer.error(held_out_inputs[number].float()))
        distil(layer, inputs_TH, epochs)
        with torch.no_grad():
            after = float(layer.error(held_out_inputs[number].float()))
        print(
            f"layer {number}: relative error {before:.3f}, then {after:.3f}; imbalance {float(layer.imbalance):.2f}",
            flush=True,
        )
        carvings.append(layer.carving(carving.norm_H))
    return carvings


def carved(model: LlamaForCausalLM, carvings: list[Carving]) -> LlamaForCausalLM:
    """Returns the model with carved layers, whose parameters beside the carvings do not train."""
    model = copy.deepcopy(model).requires_grad_(False)
    for layer, carving in zip(decoder_layers(model), carvings, strict=True):
        layer.mlp = cast(LlamaMLP, CarvedFeedForward(layer.mlp, carving, TOP_K))
        layer.post_attention_layernorm.weight = torch.nn.Parameter(carving.norm_H)
    return model


def carved_layers(model: LlamaForCausalLM) -> list[CarvedFeedForward]:
    return [cast(CarvedFeedForward, layer.mlp) for layer in decoder_layers(model)]


def carvings_of(model: LlamaForCausalLM) -> list[Carving]:
    """Returns what a carved model has learned, by layer."""
    norms = [layer.post_attention_layernorm.weight for layer in decoder_layers(model)]
    return [layer.carving(norm_H) for layer, norm_H in zip(carved_layers(model), norms, strict=True)]


def divergence(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Returns the KL divergence of the next token's distribution from the teacher's, in nats, as a mean."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = teacher(ids).logits.float().log_softmax(-1)
        logits = student(ids).logits
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1).mean()


def distil_end_to_end(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: torch.Tensor, minutes: float, batch: int, save: Path
) -> None:
    """Teaches routers, scales and normalisations the teacher's distribution for so long."""
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    norms = [parameter for name, parameter in trained.items() if "norm" in name]
    others = [parameter for name, parameter in trained.items() if "norm" not in name]
    groups = [{"params": others, "peak": PEAK}, {"params": norms, "peak": PEAK / 10}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
    began, saved, step, smooth = time.monotonic(), time.monotonic(), 0, None
    progress = tqdm(desc="end to end")
    while (done := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done, group["peak"])
        loss = divergence(student, teacher, ids[torch.randint(len(ids), (batch,))])
        optimizer.zero_grad()
        (loss + BALANCE_END_TO_END * sum(layer.imbalance for layer in carved_layers(student))).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        step += 1
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        progress.set_postfix(kl=f"{smooth:.3f}")
        progress.update()
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save_carvings(carvings_of(student), save)


def main(
    start: Annotated[Path | None, typer.Option(help="A carving to train further. By default, layer by layer.")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = CARVINGS,
    shared: Annotated[int, typer.Option(help="Neurons of the shared expert.")] = 1024,
    width: Annotated[int, typer.Option(help="Neurons of each routed expert.")] = 48,
    tokens: Annotated[int, typer.Option(help="Tokens that each layer learns from by itself.")] = 65536,
    epochs: Annotated[int, typer.Option(help="Times that each layer sees them.")] = 6,
    minutes: Annotated[float, typer.Option(help="Minutes of training end to end.")] = 60,
    batch: Annotated[int, typer.Option(help="Sequences of a step end to end.")] = 4,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    teacher, tokenizer = dense_model()
    ids = sequences(tokenizer, seed)
    held_out, ids = ids[:16], ids[16:]
    if start:
        carvings = load_carvings(start)
    else:
        shape = Shape(shared=shared, width=width)
        carvings = carve_layer_by_layer(teacher, ids[: tokens // LENGTH], held_out, shape, epochs)
        save_carvings(carvings, output)
    student = carved(teacher, carvings)
    with torch.no_grad():
        print(f"KL divergence on held-out text: {divergence(student, teacher, held_out):.3f}", flush=True)
    if minutes:
        distil_end_to_end(student, teacher, ids, minutes, batch, output)
    with torch.no_grad():
        print(f"KL divergence on held-out text: {divergence(student, teacher, held_out):.3f}")
    save_carvings(carvings_of(student), output)


if __name__ == "__main__":
    typer.run(main)
