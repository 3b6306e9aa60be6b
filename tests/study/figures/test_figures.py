"""`moepp figures`: counts against naive loops, words, the same bytes twice, bad input, the page in a browser."""

import csv
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from moepp.cli import main
from moepp.model import MoEConfig
from moepp.study.figures import parts_of_speech
from moepp.study.figures.finding_figures import pathway
from moepp.study.figures.findings import Bootstrap, Estimate, Finding
from moepp.study.figures.parts_of_speech import (
    CLASSES,
    NONE,
    PartsOfSpeech,
    lexicon_tagger,
    open_tagger,
    token_texts,
)
from moepp.study.figures.routing_stats import MOST_PASSAGES, Passages, RoutingCounts, Scores, Sums
from moepp.study.style import KIND_COLOURS
from moepp.text.corpus_list import Wheel
from moepp.text.token_files import TokenFiles
from moepp.training import checkpoint
from moepp.training.checkpoint import load
from tests.conftest import tiny
from tests.training.test_bad_input import refused

LEXICON = "; a comment\nthe DT\nrouter NN\nsends VBZ\ncopy VB\ntwo CD\nCopy NNP\n"
PICTURES = {
    *("load", "tokens", "parts_of_speech", "passage", "scores", "pathway"),
    *("finding1_correlation", "finding2_spread", "finding3_ffn_by_domain"),
    *("finding4_activations", "finding5_divergence"),
}


# ---- statistics --------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_naive_loop() -> None:
    moe, L, V, B, S = MoEConfig(n_ffn=3, n_const=2), 3, 11, 4, 6
    rng = np.random.default_rng(0)
    counts = RoutingCounts(moe, L, [""] * V)
    seen = []  # (domain, token, class, experts of each layer) of every token
    for _ in range(3):
        domains = [str(name) for name in rng.choice(["a", "b"], B)]
        experts = np.array([[[rng.permutation(7)[:2] for _ in range(L)] for _ in range(S)] for _ in range(B)])
        tokens, classes = rng.integers(V, size=(B, S)), rng.integers(NONE, len(CLASSES), (B, S))
        valid = np.arange(S) < rng.integers(1, S + 1, B)[:, None]
        counts.add(domains, tokens, classes, valid, experts)
        seen += [
            (domains[b], tokens[b, s], classes[b, s], experts[b, s].tolist())
            for b in range(B)
            for s in range(S)
            if valid[b, s]
        ]

    def kind(e: int) -> int:
        return 0 if e < 3 else 1 if e < 5 else 2 if e < 6 else 3

    def ffn(choices: list[int]) -> int:
        return sum(e < 3 for e in choices)

    sums = Bootstrap(counts).sums
    names = list(counts.passages.sums)
    for d, name in enumerate(names):
        mine = [experts for domain, _, _, experts in seen if domain == name]
        assert sums.n_D[d] == len(mine)
        for layer in range(L):
            mean = np.mean([ffn(experts[layer]) for experts in mine])
            assert sums.ffn_DL[d, layer] == pytest.approx(mean)
            for e in range(7):
                assert sums.chosen_DLE[d, layer, e] == sum(e in experts[layer] for experts in mine)
        const = np.mean([[e in experts[layer] for e in (3, 4) for layer in range(L)] for experts in mine])
        assert sums.activations()[d, 1] == pytest.approx(const)
    loads = np.array([[ffn(choices) for choices in experts] for *_, experts in seen])
    assert sums.correlation() == pytest.approx(np.corrcoef(loads.T))
    assert sums.adjacent_correlation() == pytest.approx((np.corrcoef(loads.T)[[0, 1], [1, 2]]).mean())
    assert sums.spread() == pytest.approx(np.var([sums.ffn_DL[0].mean(), sums.ffn_DL[1].mean()], ddof=1))
    for c in range(len(CLASSES)):
        of_class = [load.mean() for load, (_, _, its, _) in zip(loads, seen, strict=True) if its == c]
        assert sums.class_n_DC[:, c].sum() == len(of_class)
        assert not of_class or sums.ffn_by_class()[c] == pytest.approx(np.mean(of_class))
    for token in range(V):
        of_token = [load.sum() for load, (_, its, _, _) in zip(loads, seen, strict=True) if its == token]
        assert counts.token_n[token] == len(of_token)
        assert counts.token_ffn[token] == sum(of_token)
        assert counts.token_ffn_squared[token] == sum(n * n for n in of_token)
    flow = np.zeros((L - 1, 4, 4))
    for *_, experts in seen:
        for layer in range(L - 1):
            for e in experts[layer]:
                for following in experts[layer + 1]:
                    flow[layer, kind(e), kind(following)] += 1
    assert (counts.flow_Lkk == flow).all()
    p = [sums.chosen_DLE[d, 0] / sums.chosen_DLE[d, 0].sum() for d in range(2)]
    kl = [np.sum(q * np.log2(q / np.mean(p, 0))) for q in p]  # Jensen–Shannon by its definition
    assert sums.divergence_by_layer()[0] == pytest.approx(np.mean(kl))


def test_scores_are_those_of_a_naive_loop() -> None:
    values = np.random.default_rng(0).random((50, 2, 2)).astype(np.float32)
    scores = Scores(2, 2)
    for part in (values[:20], values[20:]):
        scores.add(part)
    for rank in range(2):
        mine = values[:, :, rank].astype(np.float64)
        assert scores.moments()[rank] == pytest.approx([mine.mean(), mine.var(), mine.min(), mine.max()])
    assert (scores.histogram[1, 0] == np.histogram(values[:, 1, 0], 100, (0, 1))[0]).all()


def test_passages_are_consecutive_and_few_however_long_the_text() -> None:
    passages = Passages()
    for i in range(1000):
        passages.add("long", np.array([1, i]))
        if i % 4 == 0:
            passages.add("short", np.array([1, 0]))
    assert passages.windows == 8
    assert MOST_PASSAGES / 2 < len(passages.sums["long"]) <= MOST_PASSAGES
    assert [n for n, _ in passages.sums["long"]] == [8] * 125
    assert passages.sums["long"][3][1] == sum(range(24, 32))
    assert [n for n, _ in passages.sums["short"]] == [8] * 31 + [2]


def counted(rates: list[float], n_windows: int, seed: int) -> Bootstrap:
    """Two layers, an FFN and a zero expert, one choice: in domain d a token takes the FFN expert at rates[d]."""
    rng = np.random.default_rng(seed)
    counts = RoutingCounts(MoEConfig(n_ffn=1, n_const=0, n_copy=0, top_k=1), 2, ["a", "b"])
    for d, rate in enumerate(rates):
        experts = (rng.random((n_windows, 16, 2, 1)) > rate).astype(int)
        nothing = np.full((n_windows, 16), NONE)
        counts.add([str(d)] * n_windows, nothing * 0, nothing, nothing < 0, experts)
    return Bootstrap(counts)


def test_chance_is_no_finding_and_a_difference_is_one() -> None:
    alike = [counted([0.5] * 4, 16, seed).estimate(Sums.spread) for seed in range(20)]
    assert sum(estimate.low > 0 for estimate in alike) <= 2
    apart = counted([0.3, 0.4, 0.5, 0.6], 40, seed=0)
    for statistic, truth in ((Sums.spread, np.var([0.3, 0.4, 0.5, 0.6], ddof=1)), (Sums.zero_excess, 0.1)):
        estimate = apart.estimate(statistic)
        assert 0 < estimate.low < truth < estimate.high
    above, plain = apart.above_chance(Sums.divergence), apart.estimate(Sums.divergence)
    assert apart.chance(Sums.divergence) < above.low < above.value < plain.value
    few = counted([0.3, 0.6], 5, seed=0)
    assert few.too_short == ["0", "1"]
    assert np.isnan(few.estimate(Sums.spread).low)


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(0.1, 0.3, "yes"), (-0.3, -0.1, "no"), (-0.1, 0.1, "cannot tell"), (np.nan, np.nan, "cannot tell")],
)
def test_a_verdict_takes_sides_where_the_interval_does(low: float, high: float, holds: str) -> None:
    estimate = Estimate(*(np.array(x) for x in ((low + high) / 2, low, high)))
    assert Finding(1, "", "", estimate, 0.0).holds == holds


@pytest.mark.parametrize(("high", "holds"), [(0.1, "no"), (0.3, "cannot tell")])
def test_a_difference_that_would_count_is_not_denied_for_want_of_text(high: float, holds: str) -> None:
    """Below what shuffled text reaches (0.5), but not below what would count (0.2)."""
    estimate = Estimate(*(np.array(x) for x in (0.05, 0.0, high)))
    assert Finding(3, "", "", estimate, 0.2, chance=0.5).holds == holds


def test_a_kind_that_the_first_layer_does_not_use_stays_in_the_pathway() -> None:
    counts = RoutingCounts(MoEConfig(n_ffn=2, n_const=0), 3, ["a", "b"])  # experts 0 and 1, copy 2, zero 3
    experts = np.tile([[0, 1], [0, 3], [1, 2]], (1, 16, 1, 1))
    nothing = np.full((1, 16), NONE)
    counts.add(["a"], nothing * 0, nothing, nothing < 0, experts)
    table, _, _ = pathway.draw(Bootstrap(counts))
    assert [*zip(table["layer"], table["from"], table["to"], strict=True)] == (
        [(layer, a, b) for layer in (1, 2) for a in ("ffn", "copy", "zero") for b in ("ffn", "copy", "zero")]
    )
    assert table.groupby("layer")["share_of_choices"].sum().tolist() == pytest.approx([1, 1])
    of_layer_2 = table[(table["layer"] == 2) & (table["from"] == "zero")].set_index("to")
    assert of_layer_2["share_of_choices"].to_dict() == {"ffn": 0.25, "copy": 0.25, "zero": 0}


def test_kinds_differ_in_brightness_too() -> None:
    """So that they can be told apart without any colour vision."""
    rgb = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in KIND_COLOURS.values()]
    brightness = sorted(np.array(rgb) @ [0.2126, 0.7152, 0.0722])
    assert np.diff(brightness).min() > 10


# ---- parts of speech ---------------------------------------------------------------------------------------


def test_tags_of_words_are_carried_to_tokens() -> None:
    words = ["", "the", " router", " sends", " cop", "y", " copy", ",", " 12", " two", "\n", " Copy", "'t", " don"]
    words += [" \ufffd", " unheard"]
    classes = PartsOfSpeech(words, lexicon_tagger(LEXICON.splitlines()))

    def tagged(*texts: str) -> list[str]:
        found = classes(np.array([words.index(text) for text in texts]))
        return ["none" if c == NONE else CLASSES[c] for c in found]

    assert tagged("", "the", " router", " sends", " two", " copy", ",", " 12", "\n", "the") == (
        ["none", "other", "noun", "verb", "number", "verb", "punctuation", "number", "white space", "none"]
    )
    assert tagged("", " cop", "y", " Copy", " unheard", ",") == (
        ["none", "word fragment", "word fragment", "noun", "noun", "punctuation"]
    )
    assert tagged("", " don", "'t", ",", " \ufffd", "y", ",") == (
        ["none", "word fragment", "word fragment", "punctuation", "word fragment", "word fragment", "punctuation"]
    )
    # a window's edge may have cut the word
    assert tagged("y", " router", " cop") == ["none", "noun", "none"]
    assert tagged("y", "y", ",", " cop", "y") == ["none", "none", "punctuation", "none", "none"]


def test_spaces_of_sentencepiece_tokens() -> None:
    tokenizer = Tokenizer(WordLevel({"▁the": 0, "re": 1, "▁": 2}, unk_token="re"))
    tokenizer.decoder = Metaspace()
    assert token_texts(tokenizer, 4) == [" the", "re", " ", ""]


def test_a_real_tagger_sees_words_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def nlp(words: list[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(pos_="VERB" if before == "to" else "NOUN") for before in ["", *words]][
            : len(words)
        ]

    nlp.vocab = None  # type: ignore[attr-defined]
    spacy = SimpleNamespace(load=lambda model: nlp, tokens=SimpleNamespace(Doc=lambda vocab, words: words))
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.tokens", spacy.tokens)
    assert open_tagger("spacy:small")(["a", "copy", "to", "copy"]) == ["noun", "noun", "noun", "verb"]


# ---- the verb ----------------------------------------------------------------------------------------------


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
        for recipe in ("moepp", "vanilla"):
            options = [*tiny(Path("text"), f"{recipe}.yaml"), "--trainer.max_steps=4", "--data.val_fraction=0.3"]
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


def test_figures_twice_are_the_same_numbers(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.stem for path in drawn.glob("*.png")} == PICTURES
    first = {path.name: path.read_bytes() for path in drawn.glob("*.csv")}
    assert {Path(name).stem for name in first} == PICTURES | {"findings"}
    for path in first:
        (drawn / path).unlink()
    assert main(["figures", CKPT, f"--versus={VANILLA}"]) == 0
    assert {path.name: path.read_bytes() for path in drawn.glob("*.csv")} == first
    assert str(drawn / "index.html") in capsys.readouterr().out


def test_figures_are_of_all_held_out_text(there: Path, drawn: Path) -> None:
    """Against the model itself, on windows cut by hand."""
    model = load(there / "runs/moepp/1/checkpoints/step-00000004.ckpt").model
    (prepared,) = there.glob("data/prepared/text*")
    tokens = np.fromfile(prepared / "val.bin", np.uint16).astype(np.int64)
    rows = {row["domain"]: row for row in read(drawn / "finding3_ffn_by_domain.csv")}
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
    assert names == {"moepp/1, with gating residuals", "vanilla/1, without gating residuals"}


def test_each_checkpoint_is_read_once(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    read_checkpoint = checkpoint.read_checkpoint
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: paths.append(path) or read_checkpoint(path))
    assert main(["figures", CKPT, f"--versus={VANILLA}", "--out=once"]) == 0
    assert [str(path) for path in paths] == [CKPT.removeprefix("--ckpt="), VANILLA]


def test_text_of_ones_own_with_labels(there: Path) -> None:
    files = sorted(path.relative_to("text") for path in Path("text").rglob("*.txt"))
    Path("labels.tsv").write_text(
        "".join(f"{path}\t{'odd' if int(path.stem) % 2 else 'even'}\n" for path in files)
    )
    assert main(["figures", CKPT, "--data.path=./text", "--out=held-out"]) == 0
    held_out = read(Path("held-out/finding3_ffn_by_domain.csv"))
    assert {row["domain"] for row in held_out} == {"plain", "loud"}
    assert main(["figures", CKPT, "--data.path=text", "--data.labels=labels.tsv", "--out=labelled"]) == 0
    labelled = read(Path("labelled/finding3_ffn_by_domain.csv"))
    assert {row["domain"] for row in labelled} == {"odd", "even"}
    # the training text: only what was held out of it; labelled files: all of them
    assert sum(int(row["tokens"]) for row in held_out) < 0.6 * sum(int(row["tokens"]) for row in labelled)
    assert main(["figures", CKPT, "--data.path=text/plain/1.txt", "--out=one", "--min_count=9999"]) == 0
    page = Path("one/index.html").read_text()
    assert "FFN experts by token: no token occurs 9999 times" in page
    assert "finding 5: there is one domain only" in page
    assert "finding 3: there is one domain only" not in page


def test_what_vanilla_has_is_drawn_and_the_rest_is_named(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", f"--ckpt={VANILLA}", "--out=vanilla"]) == 0
    drawn = {"load", "scores", "finding5_divergence"}
    assert {path.stem for path in Path("vanilla").glob("*.png")} == drawn
    assert [row["number"] for row in read(Path("vanilla/findings.csv"))] == ["5"]
    printed = " ".join(capsys.readouterr().out.split())
    for what in ("FFN experts by token", "parts of speech", "a passage of text", "finding 1", "pathway"):
        assert f"not drawn: {what}: vanilla MoE has FFN experts alone" in printed


def test_without_a_network_only_the_parts_of_speech_are_left_out(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_of_speech, "LEXICON", Wheel("no-such==1", there / "no.whl", "0" * 64))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["figures", CKPT, "--out=offline"]) == 0
    assert {path.stem for path in Path("offline").glob("*.png")} == PICTURES - {"parts_of_speech"}
    assert "not drawn: parts of speech: cannot download no-such==1" in " ".join(capsys.readouterr().out.split())


def test_bad_input(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, "foreign.ckpt")
    Path("short.txt").write_text("Too little.")
    Path("loose.tsv").write_text("plain/0.txt\tplain\n")
    Path("wrong.tsv").write_text("plain/0.txt\tplain\nnowhere.txt\tloud\n")
    Path("spaces.tsv").write_text("plain/0.txt plain\n")
    other = torch.load(VANILLA, weights_only=True)
    other["moepp"]["tokenizer"] = other["moepp"]["tokenizer"].replace('"merges"', '"merges" ')
    torch.save(other, "other.ckpt")
    text, labels = "--data.path=text", "--data.labels"
    for options, message in (
        (["--ckpt=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--ckpt=foreign.ckpt"], "foreign.ckpt: was not written by moepp"),
        ([CKPT, "--versus=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        ([CKPT, "--versus=other.ckpt"], "other.ckpt has another tokenizer"),
        ([CKPT, "--data.path=short.txt"], "short.txt has 11 tokens, fewer than one sequence of 32"),
        ([CKPT, "--data.path=nowhere"], "nowhere does not exist"),
        (
            [CKPT, "--data.out_root=nowhere"],
            "data.path: the text that the checkpoint was trained on is not in nowhere",
        ),
        ([CKPT, f"{labels}=wrong.tsv"], "data.labels: name the folder"),
        ([CKPT, text, f"{labels}=nowhere.tsv"], "nowhere.tsv does not exist"),
        ([CKPT, text, f"{labels}=wrong.tsv"], "wrong.tsv, line 2: text has no text file nowhere.txt"),
        ([CKPT, text, f"{labels}=loose.tsv"], "loose.tsv has no line for loud/0.txt, one of 19 files"),
        ([CKPT, text, f"{labels}=spaces.tsv"], "spaces.tsv, line 1: must be a file, a tab and its domain"),
        ([CKPT, "--data.path=short.txt", f"{labels}=wrong.tsv"], "short.txt is no folder"),
        ([CKPT, "--tagger=oracle"], "tagger: must be lexicon or spacy:MODEL"),
        ([CKPT, "--tagger=spacy:small"], "tagger: needs spaCy: pip install spacy"),
        ([CKPT, "--min_count=1"], "min_count: must be at least 2"),
        ([CKPT, "--min_counts=3"], "did you mean min_count?"),
    ):
        assert message in refused(capsys, "figures", *options)


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
