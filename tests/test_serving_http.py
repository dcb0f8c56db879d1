"""The service over real connections on loopback, with the real digits: that it says what the Python call says, to the
last digit, and what it does with too many, too large, too slow and unauthorised requests.
"""

from __future__ import annotations

import base64
import gzip
import hmac
import io
import json
import logging
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
from helpers import digits
from PIL import Image
from served import Slow, copy_of, guard, home, open_guard, pictures, predicted, serving, until

from nndefense.cli.app import build
from nndefense.errors import InputError
from nndefense.serving.app import answer_json
from nndefense.serving.client import Client, ServiceError
from nndefense.serving.http.problem import PROBLEMS, ServiceProblem
from nndefense.serving.http.security import Gate, Keys
from nndefense.serving.http.settings import ServingSettings, is_loopback
from nndefense.serving.pictures.limits import Limits, Refused

KEY, ADMIN = "a-key-of-some-length-1", "an-admin-key-of-length-2"
Json = dict[str, Any]


def form(files: tuple[bytes, ...]) -> Json:
    return {"files": [("files", (f"{n}.png", data, "image/png")) for n, data in enumerate(files)]}


def base64_json(files: tuple[bytes, ...], **more: int) -> Json:
    return {"json": {"images": [base64.b64encode(data).decode() for data in files], **more}}


def raw(data: bytes) -> Json:
    return {"content": data, "headers": {"content-type": "image/png"}}


def expected(files: tuple[bytes, ...], by: Any = None, **options: Any) -> bytes:
    """The whole body that an answer must have."""
    by = by or guard()
    return answer_json(predicted(list(files), by, **options), by.fingerprint, by.database.fingerprint)


def assert_problem(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    value = answer.json()
    assert value["status"] == status
    assert value["type"] == f"/problems/{code}"
    assert value["title"]
    assert value["detail"]
    assert value["instance"] == f"urn:uuid:{answer.headers['x-request-id']}"


# -- the same as in Python ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Any:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Any) -> Any:
    with served.client() as found:
        yield found


@pytest.mark.parametrize(
    ("count", "options"), [(1, {}), (7, {}), (40, {"top": 2, "neighbors": 3}), (3, {"top": 10, "neighbors": 0})]
)
def test_every_form_of_request_gives_the_python_call_s_answer(client: httpx.Client, count: int, options: Json) -> None:
    files = pictures()[:count]
    wanted = expected(files, **options)
    assert len(json.loads(wanted)["predictions"]) == count
    assert client.post("/v1/classify", params=options, **form(files)).content == wanted
    assert client.post("/v1/classify", data=options, **form(files)).content == wanted
    assert client.post("/v1/classify", **base64_json(files, **options)).content == wanted
    assert client.post("/v1/classify", params=options, **base64_json(files, top=1)).content == (
        wanted if "top" in options else expected(files, top=1)
    )
    if count == 1:
        assert client.post("/v1/classify", params=options, **raw(files[0])).content == wanted


GETS = ["/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/model", "/problems/not_found", "/page/page.js"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    full, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (full.status_code, b"") == (200, b"")
    assert set(head.headers) == set(full.headers)
    assert head.headers["content-type"] == full.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == full.headers["content-length"] == str(len(full.content))


def test_head_where_get_does_not_work(client: httpx.Client) -> None:
    for path, status in (("/v1/classify", 405), ("/nowhere", 404), ("/v1/neighbors/none/image", 404)):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (client.get(path).status_code, b"") == (status, b"")
    # The connection goes on after it.
    assert client.head("/healthz").status_code == client.get("/healthz").status_code == 200


def packed(data: bytes, content_type: str, encoding: str = "gzip") -> Json:
    return {"content": data, "headers": {"content-type": content_type, "content-encoding": encoding}}


def test_bodies_in_gzip(client: httpx.Client) -> None:
    file, wanted = pictures()[0], expected(pictures()[:1])
    for encoding in ("gzip", "GZIP", "x-gzip", "identity, gzip"):
        answer = client.post("/v1/classify", **packed(gzip.compress(file), "image/png", encoding))
        assert answer.content == wanted, answer.text
    assert client.post("/v1/classify", **packed(file, "image/png", "identity")).content == wanted
    # As a sender makes it that flushes in between; and as chunks, of which the length is not known.
    twice = gzip.compress(file[:50]) + gzip.compress(file[50:])
    assert client.post("/v1/classify", **packed(twice, "image/png")).content == wanted
    text = json.dumps(base64_json(pictures()[:3])["json"]).encode()
    chunks = packed(gzip.compress(text), "application/json")
    chunks["content"] = iter([chunks["content"][:30], chunks["content"][30:]])
    assert client.post("/v1/classify", **chunks).content == expected(pictures()[:3])


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "gzip, br", "nonsense"])
def test_other_encodings_are_refused(client: httpx.Client, encoding: str) -> None:
    answer = client.post("/v1/classify", **packed(gzip.compress(pictures()[0]), "image/png", encoding))
    assert_problem(answer, 415, "unsupported_media_type")
    assert "encoding" in answer.json()["detail"]
    assert answer.headers["accept-encoding"] == "gzip, identity"


def test_gzip_that_is_none(client: httpx.Client) -> None:
    whole = gzip.compress(pictures()[0])
    wrong = whole[:-8] + bytes(4) + whole[-4:]
    for data in (pictures()[0], whole[:-1], whole[:20], wrong, whole + b"more", b"", gzip.compress(b"") * 65):
        answer = client.post("/v1/classify", **packed(data, "image/png"))
        assert_problem(answer, 400, "malformed_request")


def test_concurrent_requests_share_batches_and_keep_their_digits(served: Any) -> None:
    draws = random.Random(1)
    asked = [
        (
            tuple(draws.sample(pictures(), draws.randrange(1, 6))),
            {"top": draws.randrange(1, 6), "neighbors": draws.choice([0, 2, 10])},
        )
        for _ in range(60)
    ]
    wanted = [expected(files, **options) for files, options in asked]
    images, batches = served.counted("nndefense_images_total"), served.counted("nndefense_batch_size_count")

    def ask(number: int) -> bytes:
        files, options = asked[number]
        with served.client() as client:
            return client.post("/v1/classify", params=options, **form(files)).content

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(len(asked))))
    assert found == wanted
    sent = sum(len(files) for files, _ in asked)
    assert served.counted("nndefense_images_total") - images == sent
    assert served.counted("nndefense_batch_size_count") - batches < sent / 1.5


def test_an_answer_says_what_it_rests_on(client: httpx.Client) -> None:
    value = client.post("/v1/classify", **raw(pictures()[0])).json()
    assert value["model"] == guard().fingerprint
    assert value["database"] == guard().database.fingerprint
    prediction = value["predictions"][0]
    assert len(prediction["neighbors"]) == guard().k
    assert sum(one["weight"] for one in prediction["neighbors"]) == pytest.approx(1, abs=1e-4)
    with serving(open_guard(k=15)) as wide, wide.client() as asked:
        value = asked.post("/v1/classify", **raw(pictures()[0])).json()["predictions"][0]
        assert len(value["neighbors"]) == 10
        value = asked.post("/v1/classify?neighbors=99", **raw(pictures()[0])).json()["predictions"][0]
        assert len(value["neighbors"]) == 15
    many = client.post("/v1/classify", **form(pictures())).json()["predictions"]
    right = [one["class"] == str(label) for one, (_, label) in zip(many, digits("test"), strict=False)]
    assert sum(right) > 0.8 * len(pictures())


def test_the_typed_client_reads_all_of_it(served: Any, tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    file.write_bytes(pictures()[0])
    with Client(served.url) as client:
        assert client.ready()
        answer = client.classify(file, pictures()[1], top=3, neighbors=4)
        assert answer.body == expected(pictures()[:2], top=3, neighbors=4)
        for ours, theirs in zip(answer.predictions, predicted(list(pictures()[:2]), top=3, neighbors=4), strict=True):
            assert ours.class_name == theirs.class_name
            assert ours.bare.class_name == theirs.bare.class_name
            assert ours.agree is theirs.agree
            assert ours.percentile is None
            assert [one.id for one in ours.neighbors] == [one.id for one in theirs.neighbors]
            assert [one.label for one in ours.neighbors] == [one.label for one in theirs.neighbors]
            assert len(ours.top) == 3
            assert ours.to_json() == theirs.to_json()
        assert client.model()["classes"] == list(guard().classes)
        assert client.neighbor_image(answer.predictions[0].neighbors[0].id).startswith(b"\x89PNG")
        with pytest.raises(ServiceError, match="415") as refused:
            client.classify(b"no image at all, but some text")
        assert (refused.value.status, refused.value.code) == (415, "unsupported_image")
        with pytest.raises(InputError, match="cannot be read"):
            client.classify(tmp_path / "missing.png")
        with pytest.raises(InputError, match="no image"):
            client.classify()
        with pytest.raises(ServiceError, match="reload_failed"):
            client.reload()
    with pytest.raises(InputError, match="not the address"):
        Client("ftp://somewhere")
    with Client("http://127.0.0.1:9", retries=0) as nobody, pytest.raises(ServiceError, match="cannot be reached"):
        nobody.model()


@pytest.mark.parametrize(
    "query",
    [
        "tops=3",
        "top=3&x=1",
        "top=0",
        "top=-1",
        "top=1.5",
        "top=x",
        "top=",
        "top=1&top=2",
        "neighbors=-1",
        "top=1_0",
        "top=٣",
        "top=99999999",
    ],
)
def test_numbers_out_of_range_are_refused(client: httpx.Client, query: str) -> None:
    assert_problem(client.post(f"/v1/classify?{query}", **raw(pictures()[0])), 422, "invalid_argument")


# -- everything else that can be asked for --------------------------------------------------------------------------


def test_a_neighbor_s_picture_is_that_of_its_row(client: httpx.Client) -> None:
    neighbor = client.post("/v1/classify", **raw(pictures()[3])).json()["predictions"][0]["neighbors"][1]
    answer = client.get(f"/v1/neighbors/{neighbor['id']}/image")
    assert answer.headers["content-type"] == "image/png"
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)))
    original, label = digits("train")[neighbor["row"]]
    assert np.abs(pixels / 255 - original[0].numpy()).max() <= 0.5 / 255 + 1e-6
    assert neighbor["label"] == str(label)
    for unknown in ("nothing", "0/../../etc/passwd", "%2e%2e%2fmanifest.json", "9" * 30):
        assert_problem(client.get(f"/v1/neighbors/{unknown}/image"), 404, "not_found")


def test_samples_can_be_classified(client: httpx.Client) -> None:
    samples = client.get("/v1/samples").json()["samples"]
    assert samples
    for sample in samples:
        answer = client.post("/v1/classify", json={"images": [sample["image"]]})
        assert answer.status_code == 200, answer.text


def test_the_model_is_described(client: httpx.Client) -> None:
    value = client.get("/v1/model").json()
    assert value == json.loads(json.dumps(guard().describe()))
    # No path of the server.
    assert str(home()) not in client.get("/v1/model").text


def test_the_probes(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["status"] == "ready"


def test_problems_are_explained(client: httpx.Client) -> None:
    for code in PROBLEMS:
        assert client.get(f"/problems/{code}").text.startswith(code)
    assert_problem(client.get("/problems/none"), 404, "not_found")


def test_the_description_fits_what_is_served(client: httpx.Client) -> None:
    value = client.get("/openapi.json").json()
    assert set(value["paths"]) >= {
        "/v1/classify", "/v1/neighbors/{id}/image", "/v1/model", "/v1/samples", "/v1/admin/reload", "/healthz",
        "/readyz", "/metrics",
    }  # fmt: skip
    content = value["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/png", "image/jpeg"} <= set(content)
    schemas = value["components"]["schemas"]
    assert client.post("/v1/classify", json=schemas["ClassifyJson"]["example"]).status_code == 200
    # An example has the members that an answer has.
    answer = client.post("/v1/classify", **raw(pictures()[0])).json()
    example = schemas["ClassifyAnswer"]["example"]
    assert set(example) == set(answer)
    assert set(example["predictions"][0]) == set(answer["predictions"][0])
    assert set(example["predictions"][0]["neighbors"][0]) == set(answer["predictions"][0]["neighbors"][0])
    assert set(schemas["PredictionAnswer"]["properties"]) == set(answer["predictions"][0])
    for reference in set(json.dumps(value).split('"$ref": "')[1:]):
        assert reference.split('"')[0].rpartition("/")[2] in schemas
    assert "HTTPValidationError" not in json.dumps(value)


def test_metrics_count_what_happened() -> None:
    with serving() as served, served.client() as client:
        for count in (1, 3):
            assert client.post("/v1/classify", **form(pictures()[:count])).status_code == 200
        assert client.post("/v1/classify", **raw(b"nonsense")).status_code in (415, 422)
        assert client.get("/nowhere/at/all").status_code == 404
        assert client.request("PROPFIND", "/nowhere").status_code == 404
        text = client.get("/metrics").text
        assert served.counted("nndefense_images_total") == 4
        assert 1 <= served.counted("nndefense_batch_size_count") <= 4
        assert served.counted("nndefense_batch_size_sum") == 4
        assert served.counted('nndefense_requests_total{route="/v1/classify",status="200"}') == 2
        assert served.counted('nndefense_requests_total{route="other",status="404"}') == 2
        assert served.counted('nndefense_request_seconds_count{route="/v1/classify"}') == 3
        for part, least in (("body", 3), ("decode", 2), ("queue", 4), ("forward", 1), ("search", 1), ("encode", 2)):
            assert served.counted(f'nndefense_part_seconds_count{{part="{part}"}}') >= least, part
        assert "nndefense_rejected_inputs_total{code=" in text
        assert served.counted("nndefense_queue_images") == 0
        assert served.counted("nndefense_buffered_bytes") == 0
        assert served.counted("nndefense_ready") == 1
        assert "process_resident_memory_bytes" in text
        # Nothing that a client makes up becomes a label.
        assert "nowhere" not in text
        assert "PROPFIND" not in text


# -- security -------------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# who\n{KEY}\n\nadmin:{ADMIN}\n")
    return file


def test_keys_are_asked_for(key_file: Path) -> None:
    with serving(open_guard, api_key_file=key_file) as served, served.client() as client:
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert client.get(path).status_code == 200
        for path in ("/v1/model", "/v1/samples", "/metrics", "/v1/neighbors/a/image", "/nowhere"):
            answer = client.get(path)
            assert_problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        wrong = [
            {},
            {"x-api-key": KEY[:-1]},
            {"x-api-key": KEY + "1"},
            {"authorization": f"Basic {KEY}"},
            {"x-api-key": ""},
        ]
        for headers in wrong:
            assert client.post("/v1/classify", headers=headers, **form(pictures()[:1])).status_code == 401
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {ADMIN}"}):
            assert client.post("/v1/classify", headers=headers, **form(pictures()[:1])).status_code == 200
        assert_problem(client.post("/v1/admin/reload", headers={"x-api-key": KEY}), 403, "forbidden")
        assert client.post("/v1/admin/reload", headers={"x-api-key": ADMIN}).status_code == 200
        assert client.get("/openapi.json").json()["components"]["securitySchemes"]
        # A reload reads the keys again.
        key_file.write_text(f"admin:{ADMIN}\n")
        assert client.post("/v1/admin/reload", headers={"x-api-key": ADMIN}).status_code == 200
        assert client.get("/v1/model", headers={"x-api-key": KEY}).status_code == 401
        # And keeps the old ones where there are none any more.
        key_file.write_text("")
        assert_problem(client.post("/v1/admin/reload", headers={"x-api-key": ADMIN}), 409, "reload_failed")
        assert client.get("/v1/model").status_code == 401
        assert client.get("/v1/model", headers={"x-api-key": ADMIN}).status_code == 200
        with Client(served.url, ADMIN) as typed:
            assert typed.classify(pictures()[0]).predictions


def test_keys_are_compared_in_constant_time() -> None:
    keys = Keys([KEY, ADMIN, "admin:" + "z" * 16])
    for given in (KEY, ADMIN, "z" * 16, "nothing", ""):
        with mock.patch.object(hmac, "compare_digest", wraps=hmac.compare_digest) as compared:
            found = keys.check(given.encode())
        # Every key is looked at, whichever fits, and always by digests of one length.
        assert compared.call_count == 3
        assert {len(word) for call in compared.call_args_list for word in call.args} == {32}
        assert found == (given in (KEY, ADMIN, "z" * 16), given == "z" * 16)
    assert KEY not in repr(vars(keys))


@pytest.mark.parametrize("line", ["short", "blank in between-------", "schlüssel-schlüssel", "admin:short"])
def test_bad_keys_are_refused(line: str) -> None:
    with pytest.raises(InputError, match="line 2 must have at least 16"):
        Keys(["# comment", line])


def test_files_of_keys_must_be_there_and_hold_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Keys.read(tmp_path / "missing")
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(InputError, match="holds no key"):
        Keys.read(tmp_path / "empty")
    assert len(Keys.read(None)) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_others_are_served_only_with_keys_or_an_explicit_waiver(host: str, key_file: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match="--api-key-file"):
        ServingSettings(host=host)
    ServingSettings(host=host, allow_open=True)
    ServingSettings(host=host, api_key_file=key_file)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert ServingSettings(host=host).api_key_file is None


@pytest.mark.parametrize(
    "wrong",
    [{"queue": 3}, {"timeout": 0}, {"timeout": float("nan")}, {"max_batch": 0}, {"port": 70000}, {"max_wait_ms": -1},
     {"max_buffered_bytes": 5}, {"threads": 0}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: Json) -> None:
    with pytest.raises(InputError):
        ServingSettings(**wrong)


def test_names_and_origins_of_other_sites_are_refused(served: Any, client: httpx.Client) -> None:
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", ""):
        assert_problem(client.get("/v1/model", headers={"host": host}), 421, "wrong_host")
    for host in (f"localhost:{served.port}", "127.0.0.1", f"[::1]:{served.port}"):
        assert client.get("/v1/model", headers={"host": host}).status_code == 200
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{served.port + 1}"):
        for path in ("/v1/classify", "/v1/admin/reload"):
            assert_problem(client.post(path, headers={"origin": origin}), 403, "forbidden")
    own = client.post("/v1/classify", headers={"origin": served.url}, **form(pictures()[:1]))
    assert own.status_code == 200
    with serving(allowed_hosts=("defence.example",)) as named, named.client() as behind:
        assert behind.get("/v1/model", headers={"host": "Defence.example"}).status_code == 200
        assert_problem(behind.get("/v1/model"), 421, "wrong_host")


# What begins or ends like a name of this machine, and is none.
@pytest.mark.parametrize(
    "host",
    ["[::1]evil", "[::1].evil.example", "[::1]:80evil", "[::1]:80:80", "localhost:evil", "localhost:80.evil.example",
     "localhost:80@evil.example", "localhost/", "localhost:8000/", "localhost\tevil", "localhost evil", "[localhost]",
     "[127.0.0.1]", "[::1", "::1", "::1]", "127.0.0.1:8000:9", "localhost:123456", "evil@localhost", "localhost#x",
     "localhost?x", "localhost\\x", "http://localhost", "localhost,evil.example", "localhost, localhost", ":80"],
)  # fmt: skip
def test_a_host_that_only_looks_like_ours_is_refused(client: httpx.Client, host: str) -> None:
    assert_problem(client.get("/v1/model", headers={"host": host}), 421, "wrong_host")


@pytest.mark.parametrize(
    "origin",
    ["http://[evil", "http://defence.example:x@evil.example", "null", "", "://", "http://", "defence.example",
     "http://defence.example:evil", "http://[defence.example]"],
)  # fmt: skip
def test_an_origin_that_only_looks_like_ours_is_refused(origin: str) -> None:
    gate = Gate(ServingSettings(allowed_hosts=("defence.example",)), Keys([]))
    scope = {"path": "/v1/classify", "query_string": b"", "method": "POST"}
    for host in ("defence.example", "defence.example:80"):
        headers = [(b"host", host.encode()), (b"origin", origin.encode())]
        with pytest.raises(ServiceProblem) as refusal:
            gate.check({**scope, "headers": headers})
        assert refusal.value.code == "forbidden"
    for good in ("https://defence.example", "https://Defence.example:8443"):
        gate.check({**scope, "headers": [headers[0], (b"origin", good.encode())]})


@pytest.mark.parametrize("name", ["host", "origin", "authorization", "x-api-key", "content-type", "content-length"])
def test_a_header_that_decides_stands_there_once(name: str, key_file: Path) -> None:
    lines = {"host": "localhost", "origin": "http://localhost", "content-type": "image/png", "content-length": "0"}
    twice = (name.encode(), lines.get(name, "key").encode())
    for keys in (Keys([]), Keys.read(key_file)):
        with pytest.raises(Refused) as refusal:
            Gate(ServingSettings(), keys).check(
                {
                    "path": "/v1/classify",
                    "query_string": b"",
                    "method": "POST",
                    "headers": [(b"host", b"localhost"), twice, twice],
                }
            )
        assert (refusal.value.status, refusal.value.code) == (400, "malformed_request")


def test_two_hosts_are_refused_by_the_server(served: Any) -> None:
    for second in (b"localhost", b"evil.example"):
        answer = raw_exchange(
            served.port,
            b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nHost: " + second + b"\r\nconnection: close\r\n\r\n",
        )
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"malformed_request" in answer


def test_clients_that_leave_are_no_defect(served: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever they leave, the log tells of no error, and others are answered."""
    picture = pictures()[0]
    whole = HEAD + b"content-length: %d\r\n\r\n" % len(picture) + picture
    sent = [
        b"POST /v1/cl",
        HEAD + b"content-length: 1000\r\n\r\nabc",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nabc",
        HEAD + b"content-length: 99999999\r\n\r\nabc",
        b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\nabc",
        whole,
        3 * whole,
        20 * b"GET /page/page.css HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ]
    with caplog.at_level(logging.WARNING):
        for data in sent:
            for abruptly in (True, False):
                for pause in (0, 0.05):
                    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
                        connection.sendall(data)
                        time.sleep(pause)
                        if abruptly:
                            # Closed at once, with a reset.
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: served.counted("nndefense_requests_in_flight") == 0)
        time.sleep(0.2)
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def test_security_headers_are_on_every_answer(client: httpx.Client) -> None:
    for answer in (client.get("/"), client.get("/v1/model"), client.get("/nowhere"), client.post("/v1/classify")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
        assert len(answer.headers.get_list("content-security-policy")) == 1


def test_a_defect_tells_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    broken = Slow(guard())
    broken.predict = mock.Mock(side_effect=RuntimeError("secret of /srv/database"))  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR), serving(broken) as served, served.client() as client:
        answer = client.post("/v1/classify", **form(pictures()[:1]))
        assert_problem(answer, 500, "internal")
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        # The log has what the answer has not, under the same id.
        until(lambda: answer.headers["x-request-id"] in caplog.text)
        assert "secret of /srv/database" in caplog.text


# -- too much, too slow ---------------------------------------------------------------------------------------------


def raw_exchange(port: int, *pieces: bytes, pause: float = 0.0, timeout: float = 15) -> bytes:
    """Send bytes over a connection of our own, and read until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionResetError:
            pass
        return found


HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
SMALL = Limits(
    max_body_bytes=20_000, max_image_bytes=10_000, body_seconds=0.5, header_seconds=0.5, max_header_bytes=4096
)


@pytest.fixture(scope="module")
def strict() -> Any:
    with serving(limits=SMALL) as found:
        yield found


def test_a_body_that_announces_too_much_is_refused_before_it_comes(strict: Any) -> None:
    answer = raw_exchange(strict.port, HEAD + b"content-length: 20001\r\nexpect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"100 Continue" not in answer
    assert b"body_too_large" in answer
    for nonsense in (b"-1", b"1e3", b"9" * 400):
        assert raw_exchange(strict.port, HEAD + b"content-length: " + nonsense + b"\r\n\r\n").split()[1][:1] == b"4"


def test_a_body_that_becomes_too_large_is_refused_while_it_comes(strict: Any) -> None:
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    answer = raw_exchange(strict.port, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 100, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert b"connection: close" in answer
    # A client that sends everything before it reads gets to read the answer.
    with strict.client() as client:
        assert_problem(client.post("/v1/classify", content=b"x" * 5_000_000), 413, "body_too_large")
    assert strict.counted("nndefense_buffered_bytes") == 0


def test_gzip_is_unpacked_within_the_limits(strict: Any) -> None:
    with strict.client() as client:
        for size in (20_001, 50_000_000):
            answer = client.post("/v1/classify", **packed(gzip.compress(bytes(size)), "image/png"))
            code = "body_too_large"
            assert_problem(answer, 413, code)
        fits = client.post("/v1/classify", **packed(gzip.compress(bytes(20_000)), "image/png"))
        assert_problem(fits, 413, "image_too_large")
    assert strict.counted("nndefense_buffered_bytes") == 0


def test_a_slow_body_is_cut_off(strict: Any) -> None:
    begun = time.monotonic()
    answer = raw_exchange(strict.port, HEAD + b"content-length: 1000\r\n\r\n", *[b"x"] * 30, pause=0.05)
    assert answer.startswith(b"HTTP/1.1 408"), answer[:200]
    assert b"slow_body" in answer
    assert time.monotonic() - begun < 10


def test_slow_and_endless_headers_are_cut_off(strict: Any) -> None:
    begun = time.monotonic()
    assert raw_exchange(strict.port, b"") == b""
    assert raw_exchange(strict.port, b"GET /healthz HTTP/1.1\r\n", *[b"a: b\r\n"] * 30, pause=0.05).startswith(
        b"HTTP/1.1 408"
    )
    many = raw_exchange(strict.port, b"GET /healthz HTTP/1.1\r\n", *[b"a: " + b"b" * 900 + b"\r\n"] * 50, pause=0.005)
    assert many.startswith(b"HTTP/1.1 431") or many == b""
    assert raw_exchange(strict.port, b"this is no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert time.monotonic() - begun < 20
    # A connection that has sent one request has the same time for the next.
    two = raw_exchange(strict.port, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET /hea", pause=0.1)
    assert two.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in two


def test_slow_requests_do_not_keep_others_waiting(strict: Any) -> None:
    connections = [socket.create_connection(("127.0.0.1", strict.port), timeout=10) for _ in range(30)]
    try:
        for connection in connections[:15]:
            connection.sendall(HEAD + b"content-length: 1000\r\n\r\nx")
        with strict.client() as client:
            begun = time.monotonic()
            assert client.post("/v1/classify", **raw(pictures()[0])).content == expected(pictures()[:1])
            assert time.monotonic() - begun < 5
    finally:
        for connection in connections:
            connection.close()


def test_all_bodies_together_are_bounded() -> None:
    limits = Limits(max_body_bytes=20_000, max_image_bytes=10_000, body_seconds=5)
    with serving(limits=limits, max_buffered_bytes=30_000) as served:
        first = socket.create_connection(("127.0.0.1", served.port), timeout=10)
        first.sendall(HEAD + b"content-length: 20000\r\n\r\n" + b"x" * 19_000)
        until(lambda: served.counted("nndefense_buffered_bytes") == 19_000)
        with served.client() as client:
            refused = client.post("/v1/classify", content=b"y" * 15_000, headers={"content-type": "image/png"})
            assert_problem(refused, 503, "queue_full")
            assert refused.headers["retry-after"]
            assert client.post("/v1/classify", **raw(pictures()[0])).status_code == 200
            first.close()
            until(lambda: served.counted("nndefense_buffered_bytes") == 0)
            assert (
                client.post("/v1/classify", content=b"y" * 15_000, headers={"content-type": "image/png"}).status_code
                < 500
            )


def test_too_many_connections_are_turned_away() -> None:
    with serving(max_connections=5) as served:
        held = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(5)]
        time.sleep(0.1)
        refused = raw_exchange(served.port, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"retry-after: " in refused
        # One that asks for nothing is not kept for long.
        begun = time.monotonic()
        assert raw_exchange(served.port, b"") == b""
        assert time.monotonic() - begun < 8
        for connection in held:
            connection.close()
        time.sleep(0.1)
        with served.client() as client:
            assert client.get("/healthz").status_code == 200


def test_overload_is_shed_with_503_and_passes() -> None:
    slow = Slow(guard())
    limits = Limits(max_images=4)
    with serving(slow, queue=8, max_batch=4, limits=limits) as served:
        slow.go.clear()

        def ask(number: int) -> httpx.Response:
            with served.client() as client:
                return client.post("/v1/classify", **form(pictures()[number : number + 1]))

        with ThreadPoolExecutor(30) as pool:
            asked = [pool.submit(ask, number) for number in range(30)]
            until(lambda: sum(one.done() for one in asked) >= 30 - 12)
            slow.go.set()
            answers = [one.result() for one in asked]
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 503}
        assert 8 <= statuses.count(200) <= 12
        for number, answer in enumerate(answers):
            if answer.status_code == 200:
                assert answer.content == expected(pictures()[number : number + 1])
            else:
                assert_problem(answer, 503, "queue_full")
                assert int(answer.headers["retry-after"]) >= 1
        # It recovers at once.
        assert all(ask(number).status_code == 200 for number in range(5))
        assert served.counted("nndefense_queue_images") == 0


def test_what_would_be_refused_is_not_even_decoded() -> None:
    slow = Slow(guard())
    with serving(slow, queue=4, max_batch=1, limits=Limits(max_images=4)) as served, ThreadPoolExecutor(8) as pool:
        slow.go.clear()

        def ask(number: int) -> httpx.Response:
            with served.client() as client:
                return client.post("/v1/classify", **raw(pictures()[number]))

        # The first is taken out of the queue before the others fill it: five at once could be one too many.
        slow.begun.clear()
        waiting = [pool.submit(ask, 0)]
        assert slow.begun.wait(20)
        waiting += [pool.submit(ask, number) for number in range(1, 5)]
        until(lambda: served.state.batcher.waiting == 4)
        decoded = served.counted('nndefense_part_seconds_count{part="decode"}')
        assert_problem(ask(5), 503, "queue_full")
        assert served.counted('nndefense_part_seconds_count{part="decode"}') == decoded
        slow.go.set()
        assert [one.result().status_code for one in waiting] == [200] * 5


def test_a_prediction_that_takes_too_long_is_given_up() -> None:
    slow = Slow(guard())
    with serving(slow, timeout=0.2) as served, served.client() as client:
        slow.go.clear()
        begun = time.monotonic()
        answer = client.post("/v1/classify", **form(pictures()[:1]))
        assert_problem(answer, 503, "timed_out")
        assert answer.headers["retry-after"]
        assert time.monotonic() - begun < 5
        # Other answers do not wait for the net.
        assert client.get("/healthz").status_code == 200
        slow.go.set()
        until(lambda: client.post("/v1/classify", **form(pictures()[:1])).status_code == 200)


def test_the_typed_client_waits_and_tries_again() -> None:
    slow = Slow(guard())
    with serving(slow, timeout=0.3) as served, Client(served.url, retries=5) as client:
        slow.go.clear()
        threading.Timer(0.6, slow.go.set).start()
        assert client.classify(pictures()[0]).body == expected(pictures()[:1])
        slow.go.clear()
        impatient = Client(served.url, retries=0)
        with pytest.raises(ServiceError, match="timed_out") as late:
            impatient.classify(pictures()[0])
        assert late.value.retry_after
        slow.go.set()
        impatient.close()


# -- beginning, change and end --------------------------------------------------------------------------------------


def test_while_the_database_is_loaded_the_service_lives_but_is_not_ready() -> None:
    opened = threading.Event()

    def slowly() -> Any:
        assert opened.wait(20)
        return guard()

    told: list[list[str]] = []
    with serving(slowly, wait=False, told=told.append) as served, served.client() as client:
        assert client.get("/healthz").status_code == 200
        for answer in (
            client.get("/readyz"),
            client.post("/v1/classify", **form(pictures()[:1])),
            client.get("/v1/model"),
        ):
            assert_problem(answer, 503, "not_ready")
            assert answer.headers["retry-after"]
        assert served.counted("nndefense_ready") == 0
        assert told == []
        opened.set()
        until(lambda: client.get("/readyz").status_code == 200)
        until(lambda: told == [served.server.addresses])
        assert client.post("/v1/classify", **form(pictures()[:1])).status_code == 200


def test_a_change_of_database_under_load_loses_no_request(tmp_path: Path) -> None:
    folder = copy_of("database", tmp_path / "database")
    other = open_guard(home() / "other")
    wanted = {by.database.fingerprint: [expected((picture,), by) for picture in pictures()] for by in (guard(), other)}
    assert len(wanted) == 2
    sources = [folder, home() / "other"]
    with serving(lambda: open_guard(sources[0])) as served:
        stop, found, wrong = threading.Event(), dict.fromkeys(wanted, 0), []

        def ask(first: int) -> None:
            with served.client() as client:
                number = first
                while not stop.is_set():
                    answer = client.post("/v1/classify", **raw(pictures()[number % 60]))
                    if answer.status_code != 200 or answer.content != wanted[answer.json()["database"]][number % 60]:
                        wrong.append(answer.text)
                        return
                    found[answer.json()["database"]] += 1
                    number += 1

        threads = [threading.Thread(target=ask, args=(7 * number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        with served.client() as admin:
            for _ in range(4):
                sources.reverse()
                answer = admin.post("/v1/admin/reload")
                assert answer.status_code == 200, answer.text
                assert answer.json()["changed"]
                assert admin.get("/v1/model").status_code == 200
                before = sum(found.values())
                until(lambda before=before: sum(found.values()) > before + 20 or bool(wrong))
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not wrong
        assert min(found.values()) > 20
        assert served.counted('nndefense_reloads_total{outcome="succeeded"}') == 4


def test_requests_accepted_before_the_change_are_answered_by_the_old_database() -> None:
    slow, other = Slow(guard()), open_guard(home() / "other")
    guards: list[Any] = [slow, other]
    with serving(lambda: guards.pop(0), max_batch=4) as served, ThreadPoolExecutor(8) as pool:
        slow.go.clear()

        def ask(number: int) -> bytes:
            with served.client() as client:
                return client.post("/v1/classify", **raw(pictures()[number])).content

        early = [pool.submit(ask, number) for number in range(6)]
        until(lambda: served.state.batcher.waiting + slow.taken >= 6)
        with served.client() as admin:
            assert admin.post("/v1/admin/reload").json()["database"] == other.database.fingerprint
        late = [pool.submit(ask, number) for number in range(2)]
        slow.go.set()
        assert [one.result() for one in early] == [expected((pictures()[number],)) for number in range(6)]
        assert [one.result() for one in late] == [expected((pictures()[number],), other) for number in range(2)]


def test_the_end_finishes_what_was_accepted() -> None:
    slow = Slow(guard())
    with serving(slow, max_batch=4) as served, ThreadPoolExecutor(12) as pool:
        slow.go.clear()

        def ask(number: int) -> httpx.Response:
            with served.client() as client:
                return client.post("/v1/classify", **raw(pictures()[number]))

        asked = [pool.submit(ask, number) for number in range(12)]
        until(lambda: served.state.batcher.waiting >= 8 and served.counted("nndefense_requests_in_flight") == 12)
        served.server.stop()
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError), served.client() as client:
            client.get("/healthz")
        slow.go.set()
        for number, one in enumerate(asked):
            assert one.result().content == expected((pictures()[number],))
        served.thread.join(20)
        assert not served.thread.is_alive()
        assert not served.state.alive


# -- the command ----------------------------------------------------------------------------------------------------


def serve_command(*words: object) -> None:
    build()(["serve", *map(str, words)], standalone_mode=False)


def asked(*words: object) -> tuple[Json, ServingSettings, Json]:
    """What the command makes of its options: the guard's arguments, the settings, and those of Ray."""
    with (
        mock.patch("nndefense.cli.serve.find_spec"),
        mock.patch("nndefense.serving.server.serve") as local,
        mock.patch("nndefense.serving.cluster.serve") as ray,
    ):
        serve_command(*words)
    assert local.called != ray.called
    if local.called:
        opened, settings = local.call_args.args
        return opened.keywords, settings, {}
    opened, settings = ray.call_args.args
    return opened, settings, {name: value for name, value in ray.call_args.kwargs.items() if name != "started"}


def test_the_command_s_defaults_are_the_settings_own(tmp_path: Path) -> None:
    opened, settings, engine = asked("--database", tmp_path)
    assert settings == ServingSettings()
    # One process, and not Ray.
    assert engine == {}
    assert asked("--database", tmp_path, "--engine", "ray")[2] == {
        "replicas": 1, "shards": 1, "max_replicas": None, "ray_address": None,
    }  # fmt: skip
    assert opened["database"] == tmp_path
    assert {name: value for name, value in opened.items() if value is not None} == {
        "database": tmp_path,
        "device": "auto",
        "calibration": True,
    }


def test_the_command_s_options_reach_the_service(key_file: Path) -> None:
    opened, settings, engine = asked(
        "--database", "db", "--classifier", "c", "--host", "0.0.0.0", "--port", 81, "--api-key-file", key_file,
        "--allowed-host", "a.example", "--allowed-host", "b.example", "--demo-attacks", "--reject-rate", 0.1,
        "--max-batch", 8, "--queue", 99, "--timeout", 3, "--max-body-mib", 2, "--max-images", 5, "--threads", 3,
        "--weighting", "uniform", "--k", 7, "--input-shape", "3,32,32", "--engine", "ray", "--replicas", 2,
        "--shards", 4, "--max-replicas", 6, "--ray-address", "10.0.0.5:6379",
    )  # fmt: skip
    assert (opened["classifier"], opened["reject_rate"], opened["k"], opened["weighting"]) == ("c", 0.1, 7, "uniform")
    assert opened["input_shape"] == (3, 32, 32)
    assert settings.allowed_hosts == ("a.example", "b.example")
    assert (settings.port, settings.demo_attacks, settings.max_batch, settings.queue) == (81, True, 8, 99)
    assert (settings.limits.max_body_bytes, settings.limits.max_image_bytes) == (2 * 2**20, 2 * 2**20)
    assert (settings.timeout, settings.limits.max_images, settings.threads) == (3, 5, 3)
    ray = {"max_replicas": 6, "ray_address": "10.0.0.5:6379"}
    assert engine == {"replicas": 2, "shards": 4, **ray}


def test_the_command_says_what_is_missing_or_does_not_go_together() -> None:
    with (
        mock.patch("nndefense.cli.serve.find_spec", return_value=None),
        pytest.raises(InputError, match="pip install fastapi uvicorn prometheus-client"),
    ):
        serve_command("--database", "db")
    with pytest.raises(InputError, match="--engine ray"):
        serve_command("--database", "db", "--shards", 2)
    with pytest.raises(InputError, match="--api-key-file"):
        serve_command("--database", "db", "--host", "0.0.0.0")
