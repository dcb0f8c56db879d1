"""Index shards in Ray actors, and the service on Ray: the same answers as on one machine, to the last bit and digit,
also while replicas and shards are killed. The cluster, its processes and the kills are real.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
import pytest
import torch
from helpers import Table, digits, table, trained, write
from hypothesis import given, settings
from hypothesis import strategies as st
from served import REPOSITORY, K, command, environment, home, open_guard, pictures, png, predicted

from index_build import build_database
from nndefense.database import ImageDatabase, shard, sharded
from nndefense.database.exact_search import TorchIndex
from nndefense.database.shard import Shard
from nndefense.errors import DatabaseError, InputError, ModelError
from nndefense.features import FeatureSpec
from nndefense.guard import Guard
from nndefense.serving.app import answer_json
from nndefense.serving.http.settings import ServingSettings

if importlib.util.find_spec("ray") is None:
    # Found, not imported: ray reads the secret of its cluster when it is.
    pytest.skip("ray is not installed", allow_module_level=True)

from nndefense.database import cluster
from nndefense.serving.cluster import deployment
from nndefense.serving.cluster.door import merged
from nndefense.serving.cluster.replica import Replica, ReplicaSpec

# Starting a cluster alone takes half a minute.
pytestmark = pytest.mark.slow

KEY, ADMIN = "a-key-of-some-length-1", "an-admin-key-of-length-2"


def doubled(count: int, kinds: int, dimension: int = 16) -> Table:
    """Rows of which many are equal, far apart in the table."""
    rows = table(count, dimension)
    chosen = torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(1))
    return Table(rows.features[chosen], rows.posteriors, rows.ids, rows.labels)


def queries(rows: Table, count: int) -> np.ndarray:
    """Some rows themselves, and some points between."""
    generator = np.random.default_rng(2)
    some = rows.features.numpy()[generator.integers(0, len(rows), count)]
    some[::2] += generator.standard_normal(some[::2].shape, dtype=np.float32) / 4
    return some


def in_parts(database: ImageDatabase, parts: int, backend: str, wanted: np.ndarray, k: int) -> Any:
    """What shards find, without Ray."""
    found = []
    for first, last in sharded.shares(len(database), parts, sharded.block_of(backend)):
        share = sharded.share_of(database.path, database.manifest, first, last)
        failed, answer = Shard(share, backend=backend).search(wanted, k)
        assert failed is None
        found.append(answer)
    return sharded.merge([keys for keys, _ in found], [rows for _, rows in found], k)


# -- shares and merging, without a cluster --------------------------------------------------------------------------


@given(st.integers(1, 20_000), st.integers(1, 12), st.sampled_from([1, 16, 1024]))
def test_shares_cover_every_row_once_in_whole_blocks(rows: int, parts: int, block: int) -> None:
    found = sharded.shares(rows, parts, block)
    assert len(found) == min(parts, -(-rows // block))
    assert [row for share in found for row in range(*share)] == list(range(rows))
    assert all(first % block == 0 for first, _ in found)
    sizes = [-(-(last - first) // block) for first, last in found]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60)
@given(st.data())
def test_merging_is_a_sort_by_distance_and_row(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    lines = data.draw(st.integers(1, 4))
    k = data.draw(st.integers(1, sum(sizes)))
    # Few values, so that many are equal; below 0 too, as the torch search has them.
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    whole = generator.integers(-2, 3, (lines, sum(sizes))).astype(np.float32)
    keys, rows, start = [], [], 0
    for size in sizes:
        part = whole[:, start : start + size]
        order = np.argsort(part, axis=1, kind="stable")[:, : min(k, size)]
        keys.append(np.take_along_axis(part, order, 1))
        rows.append(order + start)
        start += size
    order = np.argsort(whole, axis=1, kind="stable")[:, :k]
    for merge in (sharded.merge, sharded._merge_in_torch):
        best, found = merge(keys, rows, k)
        assert np.array_equal(best, np.take_along_axis(whole, order, 1))
        assert np.array_equal(found, order)


@pytest.mark.parametrize("dimension", [16, 500])
@pytest.mark.parametrize("kinds", [150, 3500])
def test_parts_find_what_the_whole_index_finds_bit_by_bit(tmp_path: Path, dimension: int, kinds: int) -> None:
    rows = doubled(3500, kinds, dimension)
    database = write(tmp_path / "db", rows)
    for count in (1, 19, 300):
        wanted = queries(rows, count)
        for k in (1, 50, 99, 100, 600):
            distances, numbers = (part.numpy() for part in database.search(wanted, k))
            for parts in (2, 50):
                keys, found = in_parts(database, parts, "faiss", wanted, k)
                assert np.array_equal(np.sqrt(np.maximum(keys, 0)), distances)
                assert np.array_equal(found, numbers)


def test_cutting_within_a_block_would_change_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reason for shares of whole blocks. On some processors the order is one for all heights.
    rows = table(3500, 500)
    database, wanted = write(tmp_path / "db", rows), queries(rows, 300)
    monkeypatch.setattr(sharded, "block_of", lambda backend: 1)
    keys, _ = in_parts(database, 3, "faiss", wanted, 10)
    found, whole = np.sqrt(np.maximum(keys, 0)), database.search(wanted, 10)[0].numpy()
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=0.05)
    if np.array_equal(found, whole):
        pytest.skip("this processor gives the same bits wherever the rows are cut")


def test_the_torch_backend_agrees_with_itself_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(3500)
    database, wanted = write(tmp_path / "db", rows), queries(rows, 50)
    monkeypatch.setattr(shard, "TORCH_BLOCK", 512)
    features = rows.features.numpy()
    one = TorchIndex(lambda first, last: features[first:last], len(rows), piece=512)
    for k in (1, 40, 2000):
        keys, found = in_parts(database, 3, "torch", wanted, k)
        distances, numbers = one.search(wanted, k)
        assert np.array_equal(sharded._completed(keys, wanted), distances)
        # Among equal distances torch has no order of its own.
        order = np.lexsort((numbers, distances), axis=1)
        again = np.lexsort((found, distances), axis=1)
        assert np.array_equal(np.take_along_axis(found, again, 1), np.take_along_axis(numbers, order, 1))


def test_a_shard_refuses_files_that_have_changed(tmp_path: Path) -> None:
    database = write(tmp_path / "db", table(2000))
    share = sharded.share_of(database.path, database.manifest, 1024, 2000)
    file = database.path / database.manifest.shards[0]
    held = Shard(share, backend="faiss")
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)
    failed, _ = Shard(share, backend="faiss").search(table(1).features.numpy(), 1)
    assert failed is not None
    assert "has changed" in failed
    # What was read before does not change with the file.
    assert held.search(table(2000).features[1500:1501].numpy(), 1)[1][1][0, 0] == 1500


def test_shares_know_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nndefense.database.writer._SHARD_BYTES", 4 * (16 + 10 + 8) * 300)
    rows = table(2500)
    database = write(tmp_path / "db", rows)
    assert len(database.manifest.shards) == 9
    share = sharded.share_of(database.path, database.manifest, 1024, 2048)
    assert [path.name for path, _, _ in share.files] == [f"rows-{n:05d}.h5" for n in (3, 4, 5, 6)]
    assert share.skipped == 900
    wanted = queries(rows, 40)
    assert np.array_equal(in_parts(database, 3, "faiss", wanted, 20)[1], database.search(wanted, 20)[1].numpy())


def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = write(tmp_path / "db", table(50))
    with pytest.raises(InputError, match="engine is 'spark'"):
        ImageDatabase.open(database.path, engine="spark")
    with pytest.raises(InputError, match="shards is 0"):
        ImageDatabase.open(database.path, engine="ray", shards=0)
    with pytest.raises(InputError, match="replicas is 3"):
        deployment.serve({"database": database.path}, ServingSettings(), replicas=3, max_replicas=2)
    with pytest.raises(DatabaseError, match="no database"):
        deployment.serve({"database": tmp_path / "none"}, ServingSettings())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "ray\[data,serve\]"'):
        ImageDatabase.open(database.path, engine="ray")


def test_an_actor_needs_no_torch() -> None:
    code = "import sys, nndefense.database.shard; print([n for n in ('torch', 'sklearn', 'ray') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(), cwd=REPOSITORY
    )
    assert done.stdout.strip() == "[]"


def test_merged_metrics_name_the_replica_and_count_requests_once() -> None:
    door = (
        b"# HELP a_total x\n# TYPE a_total counter\na_total 1.0\n# TYPE nndefense_requests counter\n"
        b'nndefense_requests_total{route="/"} 5.0\n'
    )
    other = (
        b"# HELP a_total x\n# TYPE a_total counter\na_total 2.0\n# TYPE nndefense_requests counter\n"
        b'nndefense_requests_total{route="/"} 3.0\n'
    )
    assert merged(door, {"r1": other}).decode().splitlines() == [
        "# HELP a_total x",
        "# TYPE a_total counter",
        'a_total{replica="door"} 1.0',
        'a_total{replica="r1"} 2.0',
        "# TYPE nndefense_requests counter",
        'nndefense_requests_total{route="/",replica="door"} 5.0',
    ]


# -- a cluster, started by the command ------------------------------------------------------------------------------


@dataclass
class Service:
    """``nndefense serve --engine ray``, which has started a cluster of its own."""

    url: str
    ray: str
    folder: Path
    process: subprocess.Popen[str]
    errors: list[str]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=90, headers={"x-api-key": KEY}, **options)

    def pids(self, title: str) -> list[int]:
        """The processes of the cluster with such a title."""
        return [pid for pid, name in descendants(self.process.pid).items() if name.startswith(title)]


def descendants(root: int) -> dict[int, str]:
    """Every process below one: its number and its command line."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            names[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    found = {root}
    while True:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        if not more:
            return {pid: names[pid] for pid in found if pid != root}
        found |= more


def built(folder: Path, count: int) -> Path:
    rows = digits("train").subset(np.arange(count))
    spec = f"digits:train[:{count}]"
    build_database(rows, trained(), FeatureSpec("block2", pca=32), folder, specs=[spec], progress=False)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("ray")
    folder = built(place / "database", 1290)
    (place / "keys").write_text(f"{KEY}\nadmin:{ADMIN}\n")
    # Read when ray is imported, which this process does later, to join the same cluster.
    # Where other tests have imported it, their secret stays.
    secret = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(16)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret, "RAY_USAGE_STATS_ENABLED": "0"}
    words = ["--database", folder, "--classifier", home() / "classifier", "--k", K, "--port", 0, "--threads", 1]
    words += ["--engine", "ray", "--replicas", 2, "--shards", 2, "--timeout", 60, "--api-key-file", place / "keys"]
    # Room for more, which the tests of a second service need.
    words += ["--max-replicas", 4, "--allowed-host", "127.0.0.1", "--max-body-mib", 1]
    child = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    try:
        line = child.stdout.readline() if child.stdout else ""
        assert "; Ray at " in line, "".join(errors)
        url, address = line.split(" on ")[1].split("; ")[:2]
        yield Service(url, address.removeprefix("Ray at "), folder, child, errors)
    finally:
        cluster.leave()
        if child.poll() is None:
            child.terminate()
        try:
            child.wait(60)
        finally:
            child.kill()
            reader.join(5)


@pytest.fixture(scope="module")
def joined(service: Service) -> str:
    """This process in the service's cluster."""
    cluster.join(service.ray)
    return service.ray


@pytest.fixture(scope="module")
def local(service: Service) -> Guard:
    """The guard on one machine."""
    return open_guard(service.folder)


def wanted(by: Guard, files: list[bytes], **options: Any) -> bytes:
    return answer_json(predicted(files, by, **options), by.fingerprint, by.database.fingerprint)


def ask(client: httpx.Client, files: list[bytes], **options: Any) -> httpx.Response:
    form = [("files", (f"{n}.png", data, "image/png")) for n, data in enumerate(files)]
    return client.post("/v1/classify", files=form, params=options)


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)


def test_shards_in_actors_find_what_one_machine_finds(service: Service, joined: str, tmp_path: Path) -> None:
    with_doubles = write(tmp_path / "db", doubled(3000, 200))
    for one in (ImageDatabase.open(service.folder), with_doubles):
        parts = ImageDatabase.open(one.path, engine="ray", shards=2, ray_address=joined)
        assert parts.sharded is not None
        assert len(set(parts.sharded.processes())) == 2
        some = one.features(np.arange(0, len(one), 7)) + 0.01
        for k in (1, K, 120):
            for theirs, ours in zip(one.search(some, k), parts.search(some, k), strict=True):
                assert torch.equal(theirs, ours)
        assert parts.verify()["index_rows"] == len(one)
        with pytest.raises(InputError, match="k is 0"):
            parts.search(some, 0)
        found = parts.subset(np.arange(100)).search(some, 5)
        assert torch.equal(found[1], one.subset(np.arange(100)).search(some, 5)[1])


def test_a_killed_shard_is_back_with_all_its_rows(joined: str, tmp_path: Path) -> None:
    one = write(tmp_path / "db", table(3000))
    parts = ImageDatabase.open(one.path, engine="ray", shards=2)
    assert parts.sharded is not None
    some = one.features(np.arange(500))
    expected = one.search(some, 20)
    before = parts.sharded.processes()
    for _ in range(2):
        os.kill(parts.sharded.processes()[1], signal.SIGKILL)
        for theirs, ours in zip(expected, parts.search(some, 20), strict=True):
            assert torch.equal(theirs, ours)
    after = parts.sharded.processes()
    assert after[0] == before[0]
    assert after[1] != before[1]
    # One that finds other files when it is back says so, and answers nothing.
    file = one.path / one.manifest.shards[0]
    file.write_bytes(b"x" * file.stat().st_size)
    os.kill(after[0], signal.SIGKILL)
    with pytest.raises(DatabaseError, match="has changed"):
        parts.search(some, 20)


def test_shards_of_a_name_are_shared_and_retired(joined: str, tmp_path: Path) -> None:
    one = write(tmp_path / "db", table(2500))
    both = [ImageDatabase.open(one.path, engine="ray", shards=3, ray_name="test-shared") for _ in range(2)]
    first, second = (database.sharded for database in both)
    assert first is not None
    assert second is not None
    assert first.processes() == second.processes()
    one.add(*table(10, seed=5).columns())
    deployment.retire("test-shared", {"0" * 64})
    assert first.check() == 2500
    deployment.retire("test-shared", {both[0].fingerprint})
    with pytest.raises(DatabaseError, match="was lost"):
        first.check()


def test_adding_rows_keeps_the_engine(joined: str, tmp_path: Path) -> None:
    write(tmp_path / "db", table(1500))
    parts = ImageDatabase.open(tmp_path / "db", engine="ray", shards=2)
    more = table(700, seed=3)
    parts.add(*more.columns())
    assert parts.sharded is not None
    assert parts.sharded.check() == 2200
    assert parts.search(more.features, 1)[1][:, 0].tolist() == list(range(1500, 2200))


def test_other_indexes_are_searched_exactly(joined: str, tmp_path: Path) -> None:
    rows = table(2000)
    write(tmp_path / "db", rows, index="IVF16,Flat")
    parts = ImageDatabase.open(tmp_path / "db", engine="ray", shards=2)
    assert parts.exact
    assert not ImageDatabase.open(tmp_path / "db").exact
    flat = faiss.IndexFlatL2(16)
    flat.add(rows.features.numpy())
    some = queries(rows, 30)
    assert np.array_equal(parts.search(some, 25)[1].numpy(), flat.search(some, 25)[1])


def test_the_service_answers_as_the_python_call_does(service: Service, local: Guard) -> None:
    assert len(service.pids("ray::ServeReplica")) == 2
    assert len(service.pids("ray::Shard")) >= 2
    asked = [(list(pictures()[n : n + 1 + n % 6]), {"top": 1 + n % 5, "neighbors": n % 11}) for n in range(50)]
    expected = [wanted(local, files, **options) for files, options in asked]
    with service.client() as client, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda one: ask(client, one[0], **one[1]).content, asked))
        assert found == expected
        # Both replicas have had a share of them.
        texts = client.get("/metrics").text
        until(lambda: sum_of(client.get("/metrics").text, "nndefense_images_total") == sum(len(f) for f, _ in asked))
        texts = client.get("/metrics").text
    counts = samples(texts, "nndefense_images_total")
    assert len([count for count in counts if count]) >= 2
    assert "nndefense_requests_total" in texts
    assert f'route="/v1/classify",status="200",replica="door"}} {len(asked)}.0' in texts


def samples(text: str, name: str) -> list[float]:
    return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{")]


def sum_of(text: str, name: str) -> float:
    return sum(samples(text, name))


def test_keys_limits_and_headers_hold(service: Service) -> None:
    with service.client() as client, httpx.Client(base_url=service.url, timeout=60) as stranger:
        answer = client.get("/v1/model")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert len(answer.headers.get_list("x-request-id")) == 1
        page = stranger.get("/")
        assert page.status_code == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        refused = stranger.get("/v1/model")
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert refused.json()["instance"] == f"urn:uuid:{refused.headers['x-request-id']}"
        assert stranger.get("/metrics").status_code == 401
        assert client.post("/v1/admin/reload").status_code == 403
        # Ray Serve's own proxy would show these to everybody.
        assert client.get("/-/routes").status_code == 404
        assert client.get("/v1/model", headers={"host": "example.org"}).json()["code"] == "wrong_host"
        assert client.post("/v1/classify", content=b"x" * (2**20 + 1)).json()["code"] == "body_too_large"
        bad = client.post("/v1/classify", content=b"no image", headers={"content-type": "image/png"})
        assert (bad.status_code, bad.headers["content-type"]) == (415, "application/problem+json")
        assert bad.json()["instance"] == f"urn:uuid:{bad.headers['x-request-id']}"
        assert client.head("/healthz").status_code in (200, 405)
        neighbor = ask(client, [pictures()[0]]).json()["predictions"][0]["neighbors"][0]
        assert client.get(f"/v1/neighbors/{neighbor['id']}/image").content.startswith(b"\x89PNG")


@contextlib.contextmanager
def stream(service: Service, local: Guard) -> Iterator[Callable[[], int]]:
    """Ask without pause from four threads, and check every answer; yields how many have come."""
    expected = {n: wanted(local, list(pictures()[n : n + 2])) for n in range(8)}
    wrong: list[str] = []
    done, stop = [0], threading.Event()

    def run(first: int) -> None:
        with service.client() as client:
            number = first
            while not stop.is_set():
                answer = ask(client, list(pictures()[number % 8 : number % 8 + 2]))
                if answer.status_code != 200 or answer.content != expected[number % 8]:
                    wrong.append(f"{answer.status_code} {answer.text[:200]}")
                done[0] += 1
                number += 1

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run, n) for n in range(4)]
        try:
            yield lambda: done[0]
        finally:
            stop.set()
    for one in running:
        one.result()
    assert not wrong


def test_a_killed_replica_costs_no_request(service: Service, local: Guard) -> None:
    with stream(service, local) as count:
        # A replica may die between two requests, when there is nothing to hand over: then another one has to.
        for _ in range(6):
            until(lambda: count() > 20)
            before = set(service.pids("ray::ServeReplica"))
            os.kill(min(before), signal.SIGKILL)
            at = count()
            until(lambda at=at: count() > at + 40)
            until(lambda before=before: len(set(service.pids("ray::ServeReplica")) - before) == 1)
            if any("a replica was lost" in line for line in service.errors):
                return
    raise AssertionError("a request that a replica took to its grave was not told of")


def test_a_killed_shard_costs_no_request(service: Service, local: Guard) -> None:
    with stream(service, local) as count:
        until(lambda: count() > 20)
        before = service.pids("ray::Shard")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        at = count()
        until(lambda: count() > at + 40)
        assert not set(before) & set(service.pids("ray::Shard"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_replicas_grow_in_number_between_their_bounds(joined: str, tmp_path: Path) -> None:
    from ray import serve as ray_serve

    spec = ReplicaSpec({"database": tmp_path, "device": "cpu"}, ServingSettings(max_batch=16), "name", 1, 2)
    fixed = ray_serve.deployment(Replica).options(**deployment._options(spec, 2))
    assert fixed.num_replicas == 2
    growing = (
        ray_serve.deployment(Replica).options(**deployment._options(spec, 5))._deployment_config.autoscaling_config
    )
    assert (growing.min_replicas, growing.max_replicas, growing.target_ongoing_requests) == (2, 5, 16)
    on_gpu = replace(spec, guard={"database": tmp_path, "device": "cuda"})
    made = ray_serve.deployment(Replica).options(**deployment._options(on_gpu, 2))
    assert made.ray_actor_options["num_gpus"] == 1


@pytest.mark.slow
def test_why_a_service_cannot_start_is_said_as_without_ray(
    service: Service, joined: str, local: Guard, tmp_path: Path
) -> None:
    guard = {"database": service.folder, "classifier": tmp_path / "none", "device": "cpu"}
    before = set(threading.enumerate())
    with pytest.raises(ModelError, match="none"):
        deployment.serve(guard, ServingSettings(port=0), ray_address=joined)
    # What still asks Ray after this process has left the cluster starts another one in it.
    left = [getattr(one, "_target", None) for one in set(threading.enumerate()) - before]
    assert not [one for one in left if str(getattr(one, "__module__", "")).startswith("nndefense")]
    # The other service of the cluster is still there, and nothing is left of this one.
    with service.client() as client:
        assert ask(client, [pictures()[0]]).content == wanted(local, [pictures()[0]])
    names = [one["name"] for one in cluster.import_ray().util.list_named_actors(all_namespaces=True)]
    assert len([name for name in names if name.endswith("-board")]) == 1


@pytest.mark.slow
def test_a_second_service_joins_the_cluster_and_leaves_it(service: Service, joined: str, local: Guard) -> None:
    words = ["--database", service.folder, "--classifier", home() / "classifier", "--k", K, "--port", 0, "--threads", 1]
    words += ["--engine", "ray", "--shards", 2, "--ray-address", joined]
    child = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    try:
        line = child.stdout.readline() if child.stdout else ""
        with httpx.Client(base_url=line.split(" on ")[1].split("; ")[0], timeout=60) as client:
            # Without keys only loopback's own names are answered to.
            assert client.get("/healthz", headers={"host": "example.org"}).status_code == 421
            for n in range(4):
                assert ask(client, [pictures()[n]]).content == wanted(local, [pictures()[n]])
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
    finally:
        child.kill()
        child.wait()
    with service.client() as client:
        assert ask(client, [pictures()[0]]).content == wanted(local, [pictures()[0]])
    until(lambda: len(service.pids("ray::ServeReplica")) == 2)


@pytest.mark.slow
def test_replicas_follow_one_that_restarts_into_another_database(
    service: Service, local: Guard, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.move(service.folder, kept)
    built(service.folder, 1200)
    new = open_guard(service.folder)
    either = {guard.database.fingerprint: wanted(guard, [pictures()[5]]) for guard in (local, new)}
    seen: list[str] = []

    def settled() -> bool:
        answer = ask(client, [pictures()[5]])
        seen.append(answer.json()["database"])
        assert answer.content == either[seen[-1]]
        return seen[-20:] == [new.database.fingerprint] * 20

    with service.client() as client:
        assert not settled()
        os.kill(service.pids("ray::ServeReplica")[0], signal.SIGKILL)
        until(settled)
        shutil.rmtree(service.folder)
        shutil.move(kept, service.folder)
        assert client.post("/v1/admin/reload", headers={"x-api-key": ADMIN}).json()["replicas"] == 2
        assert ask(client, [pictures()[5]]).content == either[local.database.fingerprint]


def test_a_reload_reaches_every_replica(service: Service, local: Guard, tmp_path: Path) -> None:
    admin = {"x-api-key": ADMIN}
    kept, other = tmp_path / "kept", built(tmp_path / "other", 1200)
    with service.client() as client:
        until(lambda: len(samples(client.get("/metrics").text, "nndefense_ready")) == 3)
        shutil.move(service.folder, kept)
        shutil.copytree(other, service.folder)
        damaged = service.folder / "index.faiss"
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1])
        refused = client.post("/v1/admin/reload", headers=admin)
        assert (refused.status_code, refused.json()["code"]) == (409, "reload_failed")
        for _ in range(6):
            assert ask(client, [pictures()[0]]).json()["database"] == local.database.fingerprint
        damaged.write_bytes(whole)
        answer = client.post("/v1/admin/reload", headers=admin).json()
        assert (answer["replicas"], answer["replicas_failed"], answer["changed"]) == (2, 0, True)
        new = open_guard(service.folder)
        for n in range(12):
            assert ask(client, [pictures()[n]]).content == wanted(new, [pictures()[n]])
        # And back, by the signal.
        shutil.rmtree(service.folder)
        shutil.move(kept, service.folder)
        reloads = sum("reloaded in 2 replicas" in line for line in service.errors)
        service.process.send_signal(signal.SIGHUP)
        until(lambda: sum("reloaded in 2 replicas" in line for line in service.errors) == reloads + 1)
        for n in range(12):
            assert ask(client, [pictures()[n]]).content == wanted(local, [pictures()[n]])


def test_it_ends_in_good_order(service: Service, local: Guard) -> None:
    cluster.leave()
    family = descendants(service.process.pid)
    noise = png(np.random.default_rng(0).random((8, 8)))
    expected = wanted(local, [noise] * 8)
    with service.client() as client, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, client, [noise] * 8) for _ in range(6)]
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        # What was accepted is answered; a connection that had not been yet may be refused.
        for one in asked:
            with contextlib.suppress(httpx.TransportError):
                assert one.result().content == expected
    assert service.process.wait(60) == 0, "".join(service.errors)
    until(lambda: not [pid for pid in family if Path(f"/proc/{pid}").exists()])
    text = "".join(service.errors)
    assert "Traceback" not in text
    assert json.dumps(KEY)[1:-1] not in text
    assert not cluster.import_ray().is_initialized()
