"""Ingest: what a file may say, what is dropped (against a naive reference), and slices kept apart in the lake."""

import json
import threading
from collections import Counter

import polars as pl
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from nbg_core.base.ids import query_id
from nbg_core.config.profile import QuerySettings
from nbg_core.config.slices import check_slice_name
from nbg_core.lake.lake import Lake
from nbg_core.lake.queries import latest_materialisation
from nbg_core.lineage.run import Run
from nbg_core.lineage.staleness import status
from nbg_core.queries import stage as queries_stage
from nbg_core.queries.dedup import COMMON_ROWS, find_drops, item
from nbg_core.queries.readers import QueryFileError, read_rows

# --- files ---------------------------------------------------------------------------------------------------------


def write(folder, name, rows):
    path = folder / name
    if name.endswith(".parquet"):
        pl.DataFrame(rows).write_parquet(path)
    else:
        lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def user(text):
    return {"role": "user", "content": text}


FULL = [
    {"prompt": "Add: 1 + 2", "answer": "3", "verifier": "reasoning_gym",
     "verifier_args": {"dataset": "chain_sum", "metadata": {"b": 1, "a": [1, 2]}}, "split": "eval", "id": "one"},
    {"prompt": "Wie heißt 東京?", "system": "Be brief.", "answer": None, "id": 2},
    {"messages": [user("a\u2028b"), {"role": "assistant", "content": "c"}, user("d")], "split": None},
]  # fmt: skip


def test_a_jsonl_row_becomes_messages_answer_verifier_and_split(tmp_path):
    path = write(tmp_path, "a.jsonl", FULL)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n  \r\n"))  # BOM, CRLF, blank lines
    one, two, three = read_rows(path)
    assert (one.line, two.line, three.line) == (1, 4, 7)
    assert (one.messages, one.answer, one.verifier, one.split) == (
        [user("Add: 1 + 2")], "3", "reasoning_gym", "eval")  # fmt: skip
    assert json.loads(one.verifier_args) == FULL[0]["verifier_args"]
    assert two.messages == [{"role": "system", "content": "Be brief."}, user("Wie heißt 東京?")]
    assert (two.answer, two.verifier, two.verifier_args, two.split) == (None, None, None, None)
    assert three.messages == FULL[2]["messages"]
    assert [r.query_id for r in (one, two, three)] == [query_id(r.messages) for r in (one, two, three)]


def test_parquet_and_jsonl_say_the_same(tmp_path):
    args = {"dataset": "number_sorting", "metadata": {"direction": "ascending"}}
    other = {"dataset": "number_sorting", "metadata": {"direction": "ascending", "difficulty": {"numbers": 2}}}
    rows = [{"prompt": "Sort: 3 1", "answer": '["1", "3"]', "verifier": "reasoning_gym", "verifier_args": args},
            {"prompt": "Sort: 2 1", "answer": '["1", "2"]', "verifier": "reasoning_gym", "verifier_args": other},
            {"prompt": "Say yes", "answer": "yes", "verifier": "exact", "verifier_args": {"case_sensitive": False}},
            {"prompt": "Say anything"}]  # fmt: skip
    expected = read_rows(write(tmp_path, "a.jsonl", rows))
    verifiers = ["reasoning_gym", "reasoning_gym", "exact", None]
    assert [(r.line, r.verifier) for r in expected] == list(enumerate(verifiers, 1))
    assert read_rows(write(tmp_path, "struct.parquet", rows)) == expected
    as_text = [r | {"verifier_args": json.dumps(r["verifier_args"]) if "verifier_args" in r else None} for r in rows]
    assert read_rows(write(tmp_path, "text.parquet", as_text)) == expected
    chats = [{"messages": [user("x")]}, {"messages": [{"role": "system", "content": "s"}, user("y")]}]
    assert read_rows(write(tmp_path, "chat.parquet", chats)) == read_rows(write(tmp_path, "chat.jsonl", chats))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": "x"', "line 2: not valid JSON at column 15"),
        (b'{"prompt": "\xff"}', "line 2: not valid UTF-8 at byte 13"),
        (b'["x"]', "line 2: a list, not an object"),
        (b'{"prompt": "x", "prompt": "y"}', "line 2: .*'prompt' appears twice"),
        (b'{"prompt": "x", "verifier_args": {"a": NaN}}', "line 2: .*NaN is not a JSON value"),
        (b"[" * 100_000, "line 2: not usable JSON: .*recursion"),
        (b'{"prompt": "\\ud800"}', "line 2, prompt: contains an unpaired surrogate at character 1"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', r"messages\[0\].content: contains an unpaired"),
        ({"prompt": "a\0"}, r"line 2, prompt: contains a null character \(U\+0000\) at character 2"),
        ({"prompt": "x", "promt": "x"}, "line 2, 'promt': unknown key; did you mean 'prompt'"),
        ({}, "line 2, prompt: missing; give 'prompt', or 'messages'"),
        ({"prompt": "  \n"}, "line 2, prompt: empty"),
        ({"prompt": 5}, "line 2, prompt: must be text, is a number"),
        ({"prompt": "x", "answer": 42}, 'line 2, answer: must be text, is a number; write "42"'),
        ({"prompt": "x", "id": True}, "line 2, id: must be text or a number, is a boolean"),
        ({"prompt": "x", "messages": [user("x")]}, "line 2, prompt: given beside 'messages'"),
        ({"system": "x", "messages": [user("x")]}, "line 2, system: given beside 'messages'"),
        ({"messages": []}, "line 2, messages: must end with a message of role 'user'"),
        ({"messages": [user("x"), {"role": "assistant", "content": "y"}]}, "line 2, messages: must end with"),
        ({"messages": [{"role": "tool", "content": "x"}, user("x")]}, r"messages\[0\].role: unknown role 'tool'"),
        ({"messages": ["x", user("x")]}, r"line 2, messages\[0\]: must be an object"),
        ({"messages": [user(" ")]}, r"line 2, messages\[0\].content: empty"),
        ({"messages": [user(None)]}, r"line 2, messages\[0\].content: must be text, is null"),
        ({"messages": [user("x") | {"contents": "x"}]}, r"line 2, messages\[0\].'contents': .*did you mean 'content'"),
        ({"prompt": "x", "split": "test"}, "line 2, split: unknown split 'test'; use 'train' or 'eval'"),
        ({"prompt": "x", "verifier": "exat", "answer": "1"}, "line 2, verifier: unknown verifier 'exat'; .*'exact'"),
        ({"prompt": "x", "verifier": "exact"}, "line 2, verifier: verifier exact needs an 'answer'"),
        ({"prompt": "x", "verifier": "regex", "answer": "("}, "line 2, verifier: .*not a regular expression"),
        ({"prompt": "x", "verifier_args": {}}, "line 2, verifier_args: there is no verifier"),
        ({"prompt": "x", "verifier": "exact", "answer": "1", "verifier_args": "{}"}, "must be an object, is text"),
        (b'{"prompt": "x", "verifier": "reasoning_gym", "answer": "1", "verifier_args": {"dataset": "chain_sum", '
         b'"metadata": {"x": 1e999}}}', "line 2, verifier_args: cannot be written as JSON"),
        ({"prompt": "x", "id": 7}, "line 2, id: 7 is also the id of line 1"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_field_and_remedy(tmp_path, row, message):
    path = write(tmp_path, "bad.jsonl", [{"prompt": "fine", "id": 7}, row, {"prompt": "fine too"}])
    with pytest.raises(QueryFileError, match=message) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}: 1 problem:\n")


def test_all_problems_are_counted_and_the_first_ones_shown(tmp_path):
    path = write(tmp_path, "bad.jsonl", [{"prompt": ""}, {"prompt": "ok"}] * 25 + [b"{", {"promt": "x", "split": "x"}])
    with pytest.raises(QueryFileError) as error:
        read_rows(path)
    text = str(error.value)
    assert ": 29 problems, the first 20 are:" in text  # 25 empty, 1 not JSON, 3 in the last row
    assert text.count("\n  line") == 20 and "line 39, prompt" in text and "line 41" not in text


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \n"), ("a.parquet", b"not parquet")])
def test_a_file_without_rows_or_of_another_kind_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QueryFileError, match="is empty; write one query|is not a Parquet file that can be read"):
        read_rows(tmp_path / name)


def test_problems_of_parquet_name_the_row(tmp_path):
    path = write(tmp_path, "a.parquet", [{"prompt": "x", "verifier_args": "{}"}, {"prompt": "y", "verifier_args": "{"}])
    with pytest.raises(QueryFileError, match="2 problems:\n  row 1, verifier_args: there is no(.|\n)*row 2.*not valid"):
        read_rows(path)


@pytest.mark.parametrize(
    "name", ["", " ", ".hidden", "a...b", "a/b", "a\\b", "a\nb", "a\tb", "a ", "a\x00b", "x" * 201]
)
def test_names_that_cannot_be_a_slice_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match="cannot be a slice: it .*rename the query file"):
        check_slice_name(name)


@pytest.mark.parametrize("name", ["addition", "a.b", "2026-11 math_v2", "東京", "a..b"])
def test_other_names_are_slices(name):
    check_slice_name(name)


# --- duplicates and contamination, against a reference that compares everything with everything ----------------------

SMALL = QuerySettings(shingle_words=2, near_duplicate_jaccard=0.6, contamination_words=4)


def shingles(text, n):
    words = text.split(" ")
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n, 0) + 1)}


def runs(text, n):
    words = text.split(" ")
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def naive_drops(own, others, s):
    """Reasons by index, from the rules as dedup.py's docstring states them."""

    def near(a, b):
        x, y = shingles(a.body, s.shingle_words), shingles(b.body, s.shingle_words)
        return len(x & y) / len(x | y) >= s.near_duplicate_jaccard

    def evidence(held_out):
        """Every run of a held-out row that is not common in its slice."""
        found = {}
        for x in held_out:
            rows = [y for y in held_out if y.slice_name == x.slice_name]
            most = min(COMMON_ROWS, len(rows) / 2) if len(rows) >= 3 else COMMON_ROWS
            n = s.contamination_words
            found[x.place] = {r for r in runs(x.body, n) if sum(r in runs(y.body, n) for y in rows) <= most}
        return found

    drops, seen = {}, {x.key: x for x in others}
    order = [i for i, x in enumerate(own) if x.split == "eval"] + [i for i, x in enumerate(own) if x.split == "train"]
    for i in order:
        if own[i].key in seen:
            drops[i] = "duplicate" if seen[own[i].key].split == own[i].split else "contaminated"
        seen.setdefault(own[i].key, own[i])
    evals = [i for i in order if own[i].split == "eval" and i not in drops]
    mine = evidence([own[i] for i in evals])
    for i in evals:
        for other in (x for x in others if x.split == "train"):
            if near(own[i], other) or mine[own[i].place] & runs(other.body, s.contamination_words):
                drops[i] = "contaminated"
    kept = []
    for i in evals:
        if i not in drops:
            if any(near(own[i], own[k]) for k in kept):
                drops[i] = "near_duplicate"
            else:
                kept.append(i)
    held_out = [own[i] for i in kept] + [x for x in others if x.split == "eval"]
    theirs = evidence(held_out)
    kept = []
    for i in (i for i in order if own[i].split == "train" and i not in drops):
        ngrams = runs(own[i].body, s.contamination_words)
        if any(near(own[i], x) or ngrams & theirs[x.place] for x in held_out):
            drops[i] = "contaminated"
        elif any(near(own[i], own[k]) for k in kept):
            drops[i] = "near_duplicate"
        else:
            kept.append(i)
    return drops


texts = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join)
rows = st.lists(st.tuples(st.sampled_from(["train", "eval"]), texts), max_size=14)


@settings(max_examples=300, deadline=None)
@given(rows, rows, st.sampled_from([0.5, 0.6, 0.75, 1.0]), st.integers(1, 3))
def test_what_is_dropped_is_what_comparing_everything_would_drop(own, others, jaccard, words):
    s = SMALL.model_copy(update={"near_duplicate_jaccard": jaccard, "shingle_words": words})
    own = [item("own", split, f"line {i}", [user(text)]) for i, (split, text) in enumerate(own)]
    others = {text: split for split, text in others}  # the lake has a text once
    others = [item(f"o{i % 2}", split, f"other {i}", [user(t)]) for i, (t, split) in enumerate(others.items())]
    assert {i: reason for i, (reason, _) in find_drops(own, others, s).items()} == naive_drops(own, others, s)


def drops_of(rows, settings=SMALL, others=()):
    items = [item("own", split, f"line {i}", messages) for i, (split, messages) in enumerate(rows)]
    return find_drops(items, list(others), settings)


def test_text_is_compared_without_case_width_white_space_and_system_message():
    system = {"role": "system", "content": "one two three four five six seven"}
    texts = ["Ｈello  World\n\tfoo bar baz quux", "hello world foo bar baz quux", "else"]
    rows = [("train", [system, user(texts[0])]), ("train", [user(texts[0].upper())]),
            ("train", [system, user(texts[1])]), ("train", [system, user(texts[2])]),
            ("train", [user(texts[2])])]  # fmt: skip
    found = {i: reason for i, (reason, _) in drops_of(rows).items()}
    assert found == {1: "near_duplicate", 2: "duplicate", 4: "near_duplicate"}


def test_a_held_out_query_wins_over_an_earlier_training_query_and_the_detail_names_it():
    rows = [("train", [user("a b c d")]), ("eval", [user("A b c d")]), ("train", [user("x a b c d y z q w e r t")])]
    drops = drops_of(rows)
    assert drops[0] == ("contaminated", "same text as line 1, held out")
    assert drops[2] == ("contaminated", "shares 4 words in a row with line 1, held out")


def test_an_instruction_that_held_out_queries_share_is_no_contamination():
    s = QuerySettings(contamination_words=6, near_duplicate_jaccard=0.9)
    ask = "please think first and then write the answer in a box:"
    few = [("eval", [user(f"{ask} q{i} q{i + 1} q{i + 2}")]) for i in range(3)]
    train = ("train", [user(f"{ask} t1 t2 t3 t4 t5 t6")])
    leak = ("train", [user("then answer in a box: q1 q2 q3 instead of q0")])
    assert {i: r for i, (r, _) in drops_of([*few, train], s).items()} == {}
    assert {i: r for i, (r, _) in drops_of([few[0], few[1], train], s).items()} == {2: "contaminated"}
    assert {i: r for i, (r, _) in drops_of([*few, train, leak], s).items()} == {4: "contaminated"}


# --- ingest into a lake ----------------------------------------------------------------------------------------------


@pytest.fixture
def open_run(make_profile):
    def open_run(**overrides) -> Run:
        profile = make_profile(**overrides)
        return Run(profile, Lake.of(profile), "run", log=lambda line: None)

    return open_run


@pytest.fixture
def run(open_run):
    return open_run(queries={"eval_fraction": 0.0})


def put(run, slice_name, rows, suffix=".jsonl"):
    return write(run.profile.resolve(run.profile.paths.queries), slice_name + suffix, rows)


def row(text, **more):
    return {"prompt": text, **more}


def rejections(run, slice_name):
    df = run.lake.sql("SELECT reason, detail FROM rejections WHERE slice = ? ORDER BY detail", [slice_name])
    return list(df.iter_rows())


def prompts(run, slice_name):
    df = run.lake.sql("SELECT split, prompt FROM queries WHERE slice = ? ORDER BY source_line", [slice_name])
    return list(df.iter_rows())


def test_rows_rejections_and_lineage_are_one_commit(run):
    put(run, "a", [row("what is one and one", answer="2", verifier="exact"), row("what is one and one"),
                   row("held out", split="eval"), row("Held  out")])  # fmt: skip
    before = run.lake.snapshot()
    report = queries_stage.materialise(run, "a")
    assert report.snapshot == before + 1 == run.lake.snapshot()
    assert {k: getattr(report, k) for k in ("asset", "slice", "rows", "new_rows", "n_train", "n_eval", "dropped")} == {
        "asset": "queries", "slice": "a", "rows": 2, "new_rows": 2, "n_train": 1, "n_eval": 1,
        "dropped": {"contaminated": 1, "duplicate": 1}}  # fmt: skip
    stored = run.lake.sql("SELECT * FROM queries WHERE split = 'train'").row(0, named=True)
    assert stored["messages"] == [user("what is one and one")]
    assert (stored["answer"], stored["verifier"], stored["verifier_args"]) == ("2", "exact", "{}")
    assert (stored["source_file"], stored["source_line"]) == ("a.jsonl", 1)
    assert rejections(run, "a") == [("duplicate", "line 2: same text as line 1"),
                                    ("contaminated", "line 4: same text as line 3, held out")]  # fmt: skip
    latest = latest_materialisation(run.lake, "queries", "a")
    assert latest["materialisation_id"] == stored["materialisation_id"]
    assert latest["data_version"] == report.data_version
    assert [s.state for s in status(run.lake, run.profile) if s.asset == "queries"] == ["fresh"]


def test_split_follows_the_query_id_and_a_row_may_say_otherwise(open_run):
    run = open_run(queries={"eval_fraction": 0.3})
    texts = [f"{i} plus {i * 7}" for i in range(600)]
    put(run, "a", [row(t) for t in texts])
    assert 0.3 - 0.06 < queries_stage.materialise(run, "a").n_eval / 600 < 0.3 + 0.06
    first = dict(p[::-1] for p in prompts(run, "a"))
    forced = {t: "train" if s == "eval" else "eval" for t, s in list(first.items())[:10]}
    put(run, "a", [row("a new one first"), *(row(t, split=forced.get(t)) for t in reversed(texts))])
    queries_stage.materialise(run, "a")
    second = dict(p[::-1] for p in prompts(run, "a"))
    second.pop("a new one first")
    assert second == first | forced


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "5"}, {"verifier": "regex", "verifier_args": {}}, {"verifier_args": {"case_sensitive": False}},
        {"split": "eval"}, {"prompt": "three"},
    ],
    ids=["answer", "verifier", "verifier_args", "split", "prompt"],
)  # fmt: skip
def test_whatever_decides_a_score_or_a_split_changes_the_data_version(run, change):
    one = row("one", answer="4", verifier="exact", verifier_args={"case_sensitive": True}, split="train")
    put(run, "a", [one, row("two", split="train")])
    first = queries_stage.materialise(run, "a")
    put(run, "a", [row("two", split="train"), one])
    assert queries_stage.materialise(run, "a").data_version == first.data_version, "in another order"
    put(run, "a", [one | change, row("two", split="train")])
    assert queries_stage.materialise(run, "a").data_version != first.data_version


def test_an_unchanged_file_adds_its_record_and_leaves_the_rows_alone(run):
    put(run, "a", [row("one"), row("two"), row("two")])
    first = queries_stage.materialise(run, "a")
    owners = "SELECT materialisation_id FROM queries UNION SELECT materialisation_id FROM rejections"
    written_by = run.lake.sql(owners).item()
    again = queries_stage.materialise(run, "a")
    assert (again.data_version, again.rows, again.new_rows) == (first.data_version, 2, 0)
    assert run.lake.sql(owners).item() == written_by
    assert latest_materialisation(run.lake, "queries", "a")["materialisation_id"] != written_by
    put(run, "a", [row("three"), row("one", answer="1"), row("two")])
    changed = queries_stage.materialise(run, "a")
    assert (changed.rows, changed.new_rows) == (3, 2)  # a new one, and one with another answer
    assert changed.data_version != first.data_version
    assert rejections(run, "a") == []


def test_an_order_that_changes_moves_source_lines_and_makes_nothing_stale(run):
    put(run, "a", [row("one"), row("two")])
    first = queries_stage.materialise(run, "a")
    put(run, "a", [row("two"), row("one")])
    again = queries_stage.materialise(run, "a")
    assert (again.data_version, again.new_rows) == (first.data_version, 0)
    assert prompts(run, "a") == [("train", "two"), ("train", "one")]


def test_a_long_prompt_is_dropped_with_the_limit_that_it_passes(open_run):
    run = open_run(queries={"eval_fraction": 0.0, "max_prompt_tokens": 30})
    put(run, "a", [row("x" * 27), row("y" * 28), row("z")])  # the template adds 3 tokens
    assert queries_stage.materialise(run, "a").dropped == {"too_long": 1}
    assert rejections(run, "a") == [("too_long", "line 2: 31 prompt tokens, limit 30 (queries.max_prompt_tokens)")]
    run = open_run(queries={"eval_fraction": 0.0, "max_prompt_tokens": 1000}, sampling={"max_tokens": 200})
    assert queries_stage.materialise(run, "a").dropped == {}
    put(run, "a", [row("x" * 54), row("y")])
    queries_stage.materialise(run, "a")
    detail = "line 1: 57 prompt tokens, limit 56 (the student's context of 256 less 200 for the response)"
    assert rejections(run, "a") == [("too_long", detail)]
    answers = {"evaluation": {"max_tokens": 200}, "sampling": {"max_tokens": 8}}  # the longer one counts
    run = open_run(queries={"eval_fraction": 0.0, "max_prompt_tokens": 1000}, **answers)
    queries_stage.materialise(run, "a")
    assert rejections(run, "a") == [("too_long", detail)]
    with pytest.raises(ValueError, match="no prompt fits: .* lower sampling.max_tokens"):
        queries_stage.materialise(open_run(sampling={"max_tokens": 256}), "a")


def test_slices_are_kept_apart_whichever_comes_first_and_again_gives_the_same(run):
    shared = "the quick brown fox jumps over the lazy dog and then runs away quickly"
    put(run, "a", [row(f"in a: {shared}", split="eval"), row("trained in a"), row("held out in a", split="eval")])
    put(run, "b", [row(f"in b: {shared} home"), row("held out in a"), row("trained in a", split="eval"),
                   row("trained in A"), row("held out in A", split="eval"), row("only in b")])  # fmt: skip
    first = {s: queries_stage.materialise(run, s) for s in ("a", "b")}
    assert first["a"].dropped == {}
    assert prompts(run, "b") == [("train", "only in b")]
    found = rejections(run, "b")
    assert [reason for reason, _ in found] == ["contaminated", "contaminated", "contaminated", "duplicate", "duplicate"]
    assert all("of slice 'a'" in detail for _, detail in found)
    for s in ("a", "b", "a"):
        again = queries_stage.materialise(run, s)
        assert (again.data_version, again.new_rows) == (first[s].data_version, 0)
    assert rejections(run, "b") == found
    clash = run.lake.sql("SELECT query_id FROM queries GROUP BY ALL HAVING count(*) > 1")
    assert clash.is_empty()


def test_a_held_out_query_that_another_slice_nearly_trains_on_is_dropped(run):
    text = "tell me how many apples are left when tom gives seven of his twelve apples to anna"
    put(run, "a", [row(text)])
    put(run, "b", [row(text.replace("tell", "say to"), split="eval"), row("x")])
    queries_stage.materialise(run, "a")
    assert queries_stage.materialise(run, "b").dropped == {"contaminated": 1}
    assert "a training query" in rejections(run, "b")[0][1]


def test_a_renamed_file_takes_its_rows_with_it(run):
    path = put(run, "old", [row("one"), row("two"), row("three")])
    queries_stage.materialise(run, "old")
    path.rename(path.with_name("new.jsonl"))
    put(run, "new", [row("one"), row("two")])
    assert queries_stage.materialise(run, "new").dropped == {}
    found = run.lake.sql("SELECT slice, prompt FROM queries ORDER BY ALL")
    assert list(found.iter_rows()) == [("new", "one"), ("new", "two"), ("old", "three")]


def test_a_file_that_leaves_nothing_to_train_on_is_refused_and_changes_nothing(run):
    put(run, "a", [row("one"), row("two")])
    queries_stage.materialise(run, "a")
    before = run.lake.snapshot()
    put(run, "a", [row("one", split="eval"), row("One")])
    with pytest.raises(QueryFileError, match="none of its 2 rows can be trained on: 1 held out .*eval_fraction.*"
                                             "1 contaminated .* First: line 2: same text as line 1"):  # fmt: skip
        queries_stage.materialise(run, "a")
    assert run.lake.snapshot() == before
    assert len(prompts(run, "a")) == 2


def test_two_files_of_one_slice_and_names_that_are_none_are_refused(run):
    put(run, "a", [row("one")])
    put(run, "a", [row("one")], suffix=".parquet")
    with pytest.raises(QueryFileError, match="slice 'a' has two files"):
        queries_stage.materialise(run, "a")
    with pytest.raises(ValueError, match="cannot be a slice"):
        queries_stage.materialise(run, "../a")


def test_a_file_that_changes_while_it_is_read_is_not_recorded_as_read(run, monkeypatch):
    put(run, "a", [row("one")])

    def read_and_change(path):
        rows = read_rows(path)
        put(run, "a", [row("other")])
        return rows

    monkeypatch.setattr(queries_stage, "read_rows", read_and_change)
    with pytest.raises(QueryFileError, match="changed while it was read"):
        queries_stage.materialise(run, "a")
    assert latest_materialisation(run.lake, "queries", "a") is None


def test_slices_are_ingested_one_at_a_time(run):
    put(run, "a", [row("one", split="train"), row("two")])
    put(run, "b", [row("one", split="eval"), row("three")])
    done = threading.Event()
    lines: list[str] = []
    other = Run(run.profile, run.lake, log=lines.append)
    thread = threading.Thread(target=lambda: (queries_stage.materialise(other, "b"), done.set()))
    lock = run.profile.resolve(run.profile.paths.work) / "locks" / "queries.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        thread.start()
        assert not done.wait(1.0)
        assert "queries[b]: waiting until another slice is ingested" in lines
    thread.join(60)
    assert done.is_set()
    queries_stage.materialise(run, "a")
    assert Counter(r for r, _ in rejections(run, "a")) == {"contaminated": 1}


def test_a_parquet_slice_and_strange_texts_survive_the_lake(run):
    strange = [
        "tab\tand\nline",
        "emoji 👩‍👩‍👧",
        "'; DROP TABLE queries; --",
        "$1 {{ x }}",
        "}, {'role': user",
        "}",
        "NULL",
        'a "quoted" \\"one\\"',
        "back\\slash\\",
        "[1, 2]",
        " spaces ",
        "\x01\x7f\u200b",
        "''",
        "a=b, c: d",
    ]
    for slice_name, texts in (("a", strange[:6]), ("b", strange[6:])):  # few rows: DuckLake stores these in another way
        put(run, slice_name, [row(t) for t in texts], suffix=".parquet")
        queries_stage.materialise(run, slice_name)
    found = run.lake.sql("SELECT prompt, messages, source_file FROM queries ORDER BY slice, source_line")
    assert found["prompt"].to_list() == strange
    assert [m[-1]["content"] for m in found["messages"].to_list()] == strange
    assert set(found["source_file"]) == {"a.parquet", "b.parquet"}
