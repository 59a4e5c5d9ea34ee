"""The tables of docs/benchmarks/training.md."""

from scripts.benchmark_tables.tables import (
    BACKENDS,
    TITLES,
    error,
    gigabytes,
    markdown,
    number,
    percent,
    read,
    runs,
    table,
)

STEP_FILES = ("jax", "tensorflow", "torch", "torch_avx512")
_LARGEST_COSTS = 10


@table
def training_steps():
    """Images per second of training steps, with a ViT and a ResNet as peers."""
    rows = []
    for file in STEP_FILES:
        for step in read(f"training_step_{file}")["steps"]:
            # A side of one token is four pixels.
            tokens = (step["image"] // 4) ** 2
            name = TITLES[file.split("_")[0]] + (", Xeon" if file.endswith("avx512") else "")
            speeds = [number(step["images per second"][form], 2) for form in ("native", "portable", "ViT", "ResNet")]
            shares = [percent(step[f"share of the {what}"]) for what in ("scans", "convolutions")]
            rows.append([name, f"`{step['preset']}`", tokens, *speeds, *shares])
    titles = ["backend", "size", "tokens", "`native`", "`portable`", "ViT", "ResNet", "share of scans"]
    return markdown([*titles, "share of convolutions"], rows)


@table
def language_model():
    """Training of a language model on one GPU, with Hugging Face as the peer."""
    rows = []
    for backend in ("jax", "torch"):
        found = read(f"gpu_lm_{backend}")["training"]
        for name, row in found.items():
            speed, rate = row["milliseconds a step"], row["model FLOPs utilisation"]
            ratio = found["Hugging Face"]["milliseconds a step"] / speed
            label = f"{name}, in the run of {TITLES[backend]}"
            peak = row["peak GiB"] and number(row["peak GiB"])
            rows.append([label, number(speed), f"{row['tokens a second']:,}", percent(rate, 1), peak, number(ratio)])
    titles = ["model and step", "ms per step", "tokens per second", "model FLOPs utilisation", "peak GiB", "speedup"]
    return markdown(titles, rows)


@table
def step_costs():
    """The largest costs of a training step on one GPU, with their floors."""
    rows = []
    for backend in ("jax", "torch"):
        for shape, found in read(f"gpu_step_costs_{backend}")["shapes"].items():
            for part in found["parts"][:_LARGEST_COSTS]:
                floor = part["floor"] and number(part["floor"])
                rows.append([TITLES[backend], shape, part["part"], number(part["ms"]), floor])
            others = sum(part["ms"] for part in found["parts"][_LARGEST_COSTS:])
            rows.append([TITLES[backend], shape, "all other parts", number(others), None])
            step, device = found["milliseconds a step"], found["device milliseconds"]
            rows.append([TITLES[backend], shape, "waiting for the host", number(step - device), None])
    return markdown(["backend", "model", "part of the step", "ms", "floor, ms"], rows)


@table
def chat_adapters():
    """Training of adapters on packed conversations on one GPU, with Hugging Face and PEFT as the peer."""
    found = read("gpu_chat_adapters_torch")["training"]
    slowest = found[-1]["milliseconds a step"]
    rows = []
    for row in found:
        speed = row["milliseconds a step"]
        cells = [row[""], number(speed), f"{row['tokens a second']:,}", number(row["peak GiB"])]
        rows.append([*cells, number(slowest / speed)])
    return markdown(["library", "ms per step", "tokens per second", "peak GiB", "speedup"], rows)


@table
def text_generation():
    """Bits per byte of three small language models and two compressors on unseen text."""
    found = read("text_generation_jax")
    rows = []
    for name in ("Jamba", "Mamba", "attention"):
        row = found[name]
        rows.append([name, f"{row['parameters']:,}", row["steps"], number(row["bits_per_byte"])])
    rows += [[name.replace("behind", "after"), None, None, number(bits)] for name, bits in found["other"].items()]
    return markdown(["model or compressor", "parameters", "steps", "bits per byte"], rows)


@table
def memory():
    """Peak memory of training steps, estimated and measured."""
    rows = []
    for row in read("memory_torch")["peaks"]:
        checkpointing = "on" if row["checkpointing"] else "off"
        difference = f"{100 * (row['ratio'] - 1):+.1f} %"
        rows.append([row["model"], checkpointing, gigabytes(row["estimate"]), gigabytes(row["measured"]), difference])
    return markdown(["model", "gradient checkpointing", "estimate, GB", "measured peak, GB", "difference"], rows)


@table
def checkpointing():
    """Time and memory with and without gradient checkpointing."""
    rows = []
    for backend in BACKENDS:
        off, on = read(f"checkpointing_{backend}")["rows"]
        row = [TITLES[backend], f"{off['ms']:,}", f"{on['ms']:,}", number(on["ms"] / off["ms"])]
        rows.append([*row, f"{off['peak MiB']:,}", f"{on['peak MiB']:,}"])
    titles = ["backend", "off, ms", "on, ms", "time, on / off", "off, MiB", "on, MiB"]
    return markdown(titles, rows)


@table
def cross_entropy():
    """Time and memory of a training step with the loss in chunks, and with the logits of all tokens."""
    rows = []
    for backend in BACKENDS:
        found = {(row["vocabulary"], row["form"]): row for row in read(f"cross_entropy_{backend}")["rows"]}
        for vocabulary in sorted({vocabulary for vocabulary, _ in found}):
            chunks, logits = (found[vocabulary, form] for form in ("chunks", "logits"))
            row = [TITLES[backend], f"{vocabulary:,}", f"{chunks['ms']:,}", f"{logits['ms']:,}"]
            row += [number(chunks["ms"] / logits["ms"]), f"{chunks['MiB']:,}", f"{logits['MiB']:,}"]
            rows.append(row)
    titles = ["backend", "vocabulary", "chunks, ms", "logits, ms", "time, chunks / logits"]
    return markdown([*titles, "chunks, MiB", "logits, MiB"], rows)


@table
def training_precision():
    """Final losses of one training in three dtype policies."""
    found = read("training_precision_jax")
    rows = [
        [f"`{name}`", f"{row['loss']:.4f}", row["to float32"], row["seconds"]] for name, row in found["ends"].items()
    ]
    rows.append(["entropy of the text, the lowest possible loss", f"{found['entropy']:.4f}", None, None])
    return markdown(["dtype policy", "loss on unseen text", "difference from float32", "training, s"], rows)


@table
def monitoring():
    """Seconds of 100 steps of `fit` without callbacks and with all probes."""
    rows = []
    for backend in ("jax", "torch"):
        found = read(f"monitoring_{backend}")
        seconds = [number(found["seconds"][name]) for name in ("none", "all")]
        rows.append([TITLES[backend], *seconds, number(found["ratio"])])
    return markdown(["backend", "without, s", "with all probes, s", "ratio"], rows)


@table
def resuming():
    """Differences between a training that was killed many times and an uninterrupted one."""
    rows = []
    for backend in BACKENDS:
        found = read(f"resuming_{backend}")
        equal = "yes" if found["identical"] else "no"
        rows.append([TITLES[backend], len(found["killed after"]), error(found["largest difference"]), equal])
    return markdown(["backend", "kills", "largest difference of a variable", "bit-identical"], rows)


@table
def training_runs():
    files = [f"training_step_{name}" for name in STEP_FILES] + ["gpu_lm_jax", "gpu_lm_torch", "text_generation_jax"]
    files += ["gpu_step_costs_jax", "gpu_step_costs_torch", "gpu_chat_adapters_torch"]
    files += ["memory_torch", "training_precision_jax", "monitoring_jax", "monitoring_torch"]
    kinds = ("checkpointing", "cross_entropy", "resuming")
    return runs(*files, *(f"{kind}_{backend}" for kind in kinds for backend in BACKENDS))
