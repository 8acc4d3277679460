"""A tiny data set in the official layout and a tiny model, cut from the sample for tests of programs."""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "script/sample_data"


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def write(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8", newline="\n")


def make_world(folder: Path, dev_queries: int = 6, train_queries: int = 24, passages: int = 60) -> Path:
    """Write the data set to `folder`/data and the model to `folder`/model; return `folder`."""
    data = folder / "data"
    dev = [json.loads(line) for line in lines(SAMPLE / "dev/dev.json")][:dev_queries]
    write(data / "dev/dev.json", [json.dumps(entry, ensure_ascii=False) for entry in dev])
    write(data / "dev/dev.q.format", [f"{entry['question']}\t-\t-\t0" for entry in dev])
    q2qid = {entry["question"]: entry["question_id"] for entry in dev}
    write(data / "dev/q2qid.dev.json", [json.dumps(q2qid, ensure_ascii=False)])
    write(data / "train/dual.train.tsv", first_queries(SAMPLE / "train/dual.train.tsv", train_queries))
    write(data / "train/cross.train.tsv", first_queries(SAMPLE / "train/cross.train.tsv", train_queries))
    make_collection(data / "passage-collection", dev, passages)
    make_model(folder / "model")
    return folder


def copy_world(world: Path, target: Path) -> Path:
    """Copy a world to `target`; the settings saved in it name the copy. Return `target`."""
    shutil.copytree(world, target)
    for saved in target.glob("output/*_hparams.json"):
        text = saved.read_text(encoding="utf-8")
        saved.write_text(text.replace(str(world), str(target)), encoding="utf-8")
    return target


def first_queries(path: Path, count: int) -> list[str]:
    rows = lines(path)
    queries = list(dict.fromkeys(row.split("\t")[0] for row in rows))[:count]
    return [row for row in rows if row.split("\t")[0] in queries]


def make_collection(folder: Path, dev: list[dict], passages: int) -> None:
    """Write two parts with the first passages of the sample, positives of the dev queries included."""
    answers = {a["paragraph_text"]: a["paragraph_id"] for entry in dev for a in entry["answer_paragraphs"]}
    ids = json.loads((SAMPLE / "passage-collection/passage2id.map.json").read_text(encoding="utf-8"))
    texts = [row.split("\t")[2] for row in lines(SAMPLE / "passage-collection/part-00")]
    others = [(text, ids[str(row)]) for row, text in enumerate(texts) if text not in answers]
    pool = dict([*others[: passages - len(answers)], *answers.items()])
    rows = [f"-\t\t{text}\t0" for text in pool]
    write(folder / "part-00", rows[: len(rows) // 2])
    write(folder / "part-01", rows[len(rows) // 2 :])
    write(folder / "passage2id.map.json", [json.dumps({str(n): pid for n, pid in enumerate(pool.values())})])


def make_model(folder: Path, hidden: int = 32, deviation: float = 0.02) -> None:
    """Write a one-layer BERT with a head of one logit; `deviation`: of its random weights."""
    import torch
    from transformers import AutoConfig, BertForSequenceClassification

    tiny = ROOT / "tests/tiny_bert"
    small = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.from_pretrained(tiny, **small, initializer_range=deviation, num_labels=1)
    torch.manual_seed(42)
    model = BertForSequenceClassification(config)
    with torch.no_grad():  # tokens attend to equal tokens, as in pretrained models: training is short
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            attention.key.weight.copy_(attention.query.weight.mul_(5.0))
    model.save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)


def options(world: Path, output: Path | str) -> list[str]:
    """Return the options that all programs share in this world."""
    paths = ["--data_dir", str(world / "data"), "--output_dir", str(output)]
    return [*paths, "--threads", "1", "--precision", "fp32"]


def train_options(world: Path, output: Path | str) -> list[str]:
    short = ["--epoch", "2", "--batch_size", "8", "--lr", "1e-3", "--log_every", "2", "--p_max_seq_len", "64"]
    return [*options(world, output), "--pretrained_model_path", str(world / "model"), *short]
