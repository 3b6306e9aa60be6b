"""`moepp figures`: the same bytes twice, all held-out text, bad input, the page in a browser."""

import csv
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from moepp.cli import main
from moepp.model.router import routers
from moepp.study.figures import parts_of_speech
from moepp.study.figures.compute_curve import read_at_budgets
from moepp.text.corpus_list import Wheel
from moepp.text.held_out import TextOptions, open_held_out
from moepp.text.token_files import TokenFiles
from moepp.training import checkpoint
from moepp.training.checkpoint import load
from tests.conftest import refused, tiny
from tests.study.figures.test_parts_of_speech import LEXICON

PICTURES = {
    *("load", "tokens", "parts_of_speech", "passage", "scores", "pathway"),
    *("compute", "finding1_correlation", "finding2_spread", "finding4_activations", "finding5_divergence"),
}


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of a few steps (moepp, vanilla), and text in two domains."""
    folder = tmp_path_factory.mktemp("figures")
    text = text_file.read_text()
    for name, part in (("plain", text[:30_000]), ("loud", text[30_000:60_000].upper())):
        (folder / "text" / name).mkdir(parents=True)
        for i in range(10):
            (folder / "text" / name / f"{i}.txt").write_text(part[i * 3000 : (i + 1) * 3000])
    lexicon = folder / "lexicon.whl"
    with ZipFile(lexicon, "w") as wheel:
        wheel.writestr("textblob/en/en-lexicon.txt", LEXICON)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe, more in (("moepp", ["--model.moe.ffn_budget=1.2"]), ("vanilla", [])):
            options = [
                *tiny(Path("text"), f"{recipe}.yaml"),
                "--trainer.max_steps=4",
                "--data.val_fraction=0.3",
                *more,
            ]
            assert main(["fit", *options]) == 0
    return folder


@pytest.fixture
def there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    lexicon = Path("lexicon.whl").absolute()
    wheel = Wheel("lexicon==1", lexicon, sha256(lexicon.read_bytes()).hexdigest())
    monkeypatch.setattr(parts_of_speech, "LEXICON", wheel)
    return trained


CKPT = "--ckpt=runs/moepp/1/checkpoints/step-00000004.ckpt"
VANILLA = "runs/vanilla/1/checkpoints/step-00000004.ckpt"


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def drawn(there: Path) -> Path:
    """The figures of the one against the other."""
    out = there / "runs/moepp/1/figures"
    if not out.exists():
        assert main(["figures", CKPT, f"--versus={VANILLA}"]) == 0
    return out


@pytest.fixture
def undrawn(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty files from here on, for pictures that nobody looks at: to draw them takes longer than all else."""

    def write_nothing(figure: plt.Figure, path: Path) -> None:
        plt.close(figure)
        path.touch()

    monkeypatch.setattr("moepp.study.figures.page.save", write_nothing)


def test_figures_twice_are_the_same_numbers(
    drawn: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.stem for path in drawn.glob("*.png")} == PICTURES
    first = {path.name: path.read_bytes() for path in drawn.glob("*.csv")}
    assert {Path(name).stem for name in first} == PICTURES | {"findings"}
    for path in first:
        (drawn / path).unlink()
    assert main(["figures", CKPT, f"--versus={VANILLA}"]) == 0
    assert {path.name: path.read_bytes() for path in drawn.glob("*.csv")} == first
    assert "runs/moepp/1/figures/index.html" in capsys.readouterr().out


def test_loss_against_compute_where_each_layer_keeps_to_the_budget(text_file: Path, there: Path) -> None:
    options = ["--model.moe.ffn_budget=1.2", "--model.moe.budget_over=layer", "--trainer.max_steps=20"]
    options += ["--trainer.val_check_interval=20", "--trainer.default_root_dir=by_layer"]
    assert main(["fit", *tiny(text_file), "--data.batch_size=16", *options]) == 0
    loaded = load("by_layer/checkpoints/step-00000020.ckpt")
    text = open_held_out(TextOptions(), loaded.meta, loaded.tokenizer, 33)
    n_tokens = sum(len(tokens_S) for _, tokens_S in text.windows())
    biases = [router.choice_bias.tolist() for router in routers(loaded.model)]
    table = read_at_budgets(text, n_tokens, 33, loaded.model)
    assert table is not None
    assert table.ffn_per_token.is_monotonic_increasing
    assert table[table.trained].loss_difference.item() == 0.0
    model, per_layer = loaded.model.eval(), []
    model.set_ffn_budget(0.4)
    assert len({float(router.choice_bias[1]) for router in routers(model)}) == 2
    for _, tokens_S in text.windows():
        _, routings = model.hidden(torch.from_numpy(tokens_S[None, :-1]))
        per_layer.append([routing.computed().sum().item() for routing in routings] + [len(tokens_S) - 1])
    *ffn_L, n = np.array(per_layer).sum(0)
    assert (np.array(ffn_L) / n).tolist() == pytest.approx([0.4, 0.4], abs=0.15)  # each of them
    model.set_ffn_budget(1.2)
    assert [router.choice_bias.tolist() for router in routers(model)] == biases  # reading leaves it as it was


def by_domain(figures: Path) -> dict[str, dict[str, str]]:
    """A row for each domain, over all layers."""
    return {row["domain"]: row for row in read(figures / "load.csv") if row["layers"] == "all layers, mean"}


def test_figures_are_of_all_held_out_text(there: Path, drawn: Path) -> None:
    """Against the model itself, on windows cut by hand."""
    model = load(there / "runs/moepp/1/checkpoints/step-00000004.ckpt").model
    (prepared,) = there.glob("data/prepared/text*")
    tokens = np.fromfile(prepared / "val.bin", np.uint16).astype(np.int64)
    rows = by_domain(drawn)
    n = 0
    for domain, (start, end) in zip(rows, TokenFiles.open(prepared).val_ranges, strict=True):
        ffn = []
        for at in range(start - 1, end - 1, 32):
            window = torch.from_numpy(tokens[at : min(at + 32, end - 1)])[None]
            ffn += [(routing.experts < 8).sum(1).double() for routing in model.hidden(window)[1]]
        assert float(rows[domain]["ffn_per_token"]) == pytest.approx(float(torch.cat(ffn).mean()), rel=1e-4)
        n += end - start
    assert sum(int(row["tokens"]) for row in rows.values()) == n
    shares = [row for row in read(drawn / "load.csv") if row["layers"] == "layer 1" and row["domain"] == "plain"]
    assert sum(float(row["experts_per_token"]) for row in shares) == pytest.approx(2, abs=1e-4)
    names = {row["checkpoint"] for row in read(drawn / "scores.csv")}
    assert names == {CKPT.removeprefix("--ckpt="), VANILLA}


def test_loss_at_other_budgets_is_the_models_own(there: Path, drawn: Path) -> None:
    """Against the model itself, given each budget by hand."""
    model = load(there / "runs/moepp/1/checkpoints/step-00000004.ckpt").model
    (prepared,) = there.glob("data/prepared/text*")
    files = TokenFiles.open(prepared)
    windows = [
        torch.from_numpy(files.val[at : min(at + 32, end - 1)].astype(np.int64))[None]
        for start, end in files.val_ranges
        for at in range(start - 1, end - 1, 32)
    ]
    rows = read(drawn / "compute.csv")
    assert [row["budget"] for row in rows if row["trained"] == "True"] == ["1.2"]
    for row in rows[::4]:
        model.set_ffn_budget(float(row["budget"]))
        nats, ffn = [], []
        with torch.inference_mode():
            for tokens in windows:
                output = model(tokens[:, :-1])
                nats.append(torch.nn.functional.cross_entropy(output.logits[0], tokens[0, 1:], reduction="none"))
                ffn += [(routing.experts < 8).sum(1).double() for routing in output.routings]
        assert float(row["loss"]) == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)
        assert float(row["ffn_per_token"]) == pytest.approx(float(torch.cat(ffn).mean()), rel=1e-4)
    for row in rows:
        low, middle, high = (float(row[f"loss_difference{end}"]) for end in ("_low", "", "_high"))
        assert low <= middle <= high
    shares = [float(row["ffn_per_token"]) for row in rows]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.5


def test_each_checkpoint_is_read_once(there: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    read_checkpoint = checkpoint.read_checkpoint
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: paths.append(path) or read_checkpoint(path))
    assert main(["figures", CKPT, f"--versus={VANILLA}", "--out=once"]) == 0
    assert [str(path) for path in paths] == [CKPT.removeprefix("--ckpt="), VANILLA]


def test_text_of_ones_own(there: Path, undrawn: None) -> None:
    for path in Path("text").rglob("*.txt"):
        domain = "odd" if int(path.stem) % 2 else "even"
        Path("own", domain).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, Path("own", domain, f"{path.parent.name}-{path.name}"))
    assert main(["figures", CKPT, "--data.path=./text", "--out=held-out"]) == 0
    held_out = by_domain(Path("held-out"))
    assert held_out.keys() == {"plain", "loud"}
    assert main(["figures", CKPT, "--data.path=own", "--out=own-figures"]) == 0
    own = by_domain(Path("own-figures"))
    assert own.keys() == {"odd", "even"}
    # of the training text only what was held out of it, of another all
    tokens = [sum(int(row["tokens"]) for row in domains.values()) for domains in (held_out, own)]
    assert tokens[0] < 0.6 * tokens[1]
    assert main(["figures", CKPT, "--data.path=text/plain/1.txt", "--out=one"]) == 0
    page = Path("one/index.html").read_text()
    assert "finding5_divergence: there is one domain only" in page
    assert "finding4_activations: there is one domain only" not in page


def test_tokens_that_are_too_few_are_named(there: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepp.study.figures.routing_stats.MIN_COUNT", 9999)
    assert main(["figures", CKPT, "--out=few"]) == 0
    assert "<li>tokens: no token occurs" in Path("few/index.html").read_text()


def test_what_vanilla_has_is_drawn_and_the_rest_is_named(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", f"--ckpt={VANILLA}", "--out=vanilla"]) == 0
    drawn = {"load", "scores", "finding5_divergence"}
    assert {path.stem for path in Path("vanilla").glob("*.png")} == drawn
    assert [row["number"] for row in read(Path("vanilla/findings.csv"))] == ["5"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "not drawn: compute: it was trained without a budget" in printed
    for what in ("tokens", "parts_of_speech", "finding1_correlation", "pathway"):
        assert f"not drawn: {what}: vanilla MoE has FFN experts alone" in printed


def test_without_a_network_only_the_parts_of_speech_are_left_out(
    there: Path, undrawn: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_of_speech, "LEXICON", Wheel("no-such==1", there / "no.whl", "0" * 64))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["figures", CKPT, "--out=offline"]) == 0
    assert {path.stem for path in Path("offline").glob("*.png")} == PICTURES - {"parts_of_speech"}
    assert "not drawn: parts_of_speech: cannot download no-such==1" in " ".join(capsys.readouterr().out.split())


def test_bad_input(there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {}}, "foreign.ckpt")
    Path("short.txt").write_text("Too little.")
    other = torch.load(VANILLA, weights_only=True)
    other["moepp"]["tokenizer"] = other["moepp"]["tokenizer"].replace('"merges"', '"merges" ')
    torch.save(other, "other.ckpt")
    for options, message in (
        (["--ckpt=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--ckpt=foreign.ckpt"], "foreign.ckpt: was not written by moepp"),
        ([CKPT, "--versus=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        ([CKPT, "--versus=other.ckpt"], "other.ckpt has another tokenizer"),
        ([CKPT, "--data.path=short.txt"], "short.txt has 11 tokens, fewer than one sequence of 32"),
        ([CKPT, "--data.path=no/where"], "no/where does not exist"),
        (
            [CKPT, "--data.out_root=nowhere"],
            "data.path: the text that the checkpoint was trained on is not in nowhere",
        ),
        ([CKPT, "--verses=3"], "did you mean versus?"),
    ):
        assert message in refused(capsys, "figures", *options)
    for module in ("lm_eval", "moepp.study.tasks.open"):
        monkeypatch.setitem(sys.modules, module, None)  # pretend that it is not installed
    line = refused(capsys, "figures", CKPT, "--data.path=nowhere")
    assert "nowhere does not exist; where it is a task of lm-eval: pip install 'moepp[eval]'" in line


# ---- the page ----------------------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# says in the title how many of the images have been decoded
PROBE = """<script>addEventListener("load", () => {
const images = [...document.images]
document.title = `${images.filter(i => i.complete && i.naturalWidth > 100).length} of ${images.length}`
})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
def test_the_page_shows_every_image_in_a_browser(drawn: Path, tmp_path: Path) -> None:
    page = (drawn / "index.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', page)  # nothing from elsewhere
    copy = tmp_path / "index.html"  # alone, without the PNGs beside it
    copy.write_text(page.replace("</html>", PROBE + "</html>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    shown = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    n = len(PICTURES)
    assert f"<title>{n} of {n}</title>" in shown.stdout
    assert ":CONSOLE" not in shown.stderr  # how chromium logs what a page writes to its console
