"""A stand-in for Google Cloud Storage with one bucket, in memory.

It serves three clients. TensorFlow, which epath and clu's writer use, always connects to
Google's hosts with https: a proxy sends it here, and it trusts a certificate that this module
creates. TensorStore, which Orbax uses for arrays, and google-cloud-storage, which Orbax uses to
find out how a bucket lists folders, accept another address.
"""

import datetime
import json
import ssl
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
NAME = "bucket"


class Bucket:
    """Serves the bucket until `close`.

    Attributes:
      objects: name of an object -> its content.
      environment: environment variables that direct a process's clients to this bucket.
    """

    def __init__(self, folder):
        self.objects, self.generations, self.uploads = {}, {}, {}
        self.lock = threading.RLock()
        pem = folder / "bucket.pem"
        pem.write_bytes(_certificate())
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(pem)
        self._server = ThreadingHTTPServer(("localhost", 0), _Handler)
        self._server.bucket = self
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        address = f"http://localhost:{self._server.server_port}"
        self.environment = {
            "https_proxy": address,
            "no_proxy": "localhost",
            "CURL_CA_BUNDLE": str(pem),
            "TENSORSTORE_GCS_HTTP_URL": address,
            "STORAGE_EMULATOR_HOST": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",
        }

    def close(self):
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()

    def put(self, name, content):
        """Stores an object with a new generation, and returns its metadata."""
        with self.lock:
            self.objects[name] = content
            self.generations[name] = self.generations.get(name, 0) + 1
            return self.metadata(name)

    def metadata(self, name):
        """Returns the metadata of an object."""
        return {
            "name": name,
            "bucket": NAME,
            "size": str(len(self.objects[name])),
            "generation": str(self.generations[name]),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def matches(self, name, query):
        """Returns whether an object has the generation that a query requires, if it does.

        Generation 0 requires that there is no such object.
        """
        generation = str(self.generations[name] if name in self.objects else 0)
        return query.get("ifGenerationMatch", generation) == generation

    def list_objects(self, query):
        """Lists a folder, or all objects below it if the query has no delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.lock:
            for name in sorted(self.objects):
                head, found, _ = name.removeprefix(prefix).partition(delimiter or "\0")
                if name.startswith(prefix) and found:
                    prefixes.add(prefix + head + found)
                elif name.startswith(prefix):
                    items.append(self.metadata(name))
        return {"items": items, "prefixes": sorted(prefixes)}


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, with the JSON interface of Cloud Storage."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each response waits 40 ms for an acknowledgement

    def log_message(self, *_):
        pass

    def do_CONNECT(self):
        """Acts as a proxy: answers the encrypted requests that are meant for Google's hosts."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.bucket.tls.wrap_socket(self.connection, server_side=True)
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", buffering=0)  # clients wait for "continue"
        self.close_connection = False
        while not self.close_connection:
            self.handle_one_request()

    def reply(self, status, content=b"", **headers):
        """Sends a response; a dictionary as JSON. In names of headers, '_' stands for '-'."""
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def body(self):
        """Reads the body of the request, in chunks or as a whole."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_any(self):
        """Answers a request for the bucket, a listing, an upload or an object."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.body()
        path = url.path.removeprefix("/upload").removeprefix("/storage/v1/b")
        path, _, target = path.partition("/rewriteTo/")
        _, bucket_name, *rest = path.split("/", 2)
        if bucket_name != NAME:
            return self.reply(403, {"error": {"code": 403, "message": "no access"}})
        name = urllib.parse.unquote(rest[0] if rest else "")
        with self.server.bucket.lock:
            if name == "":
                return self.reply(200, {"name": NAME, "location": "US"})
            if name == "storageLayout":
                return self.reply(200, {"hierarchicalNamespace": {"enabled": False}})
            if name == "o":
                return self.list_or_upload(query, body)
            name = name.removeprefix("o/")
            is_content = url.path == path and not path.startswith("/storage")
            return self.access_object(
                name, query, target, is_content or query.get("alt") == "media"
            )

    def list_or_upload(self, query, body):
        """Lists objects, stores one, or starts or completes a resumable upload."""
        bucket = self.server.bucket
        if self.command == "GET":
            return self.reply(200, bucket.list_objects(query))
        if "upload_id" in query:
            return self.reply(200, bucket.put(bucket.uploads[query["upload_id"]], body))
        if not bucket.matches(query["name"], query):
            return self.reply(412)
        if query["uploadType"] == "media":
            return self.reply(200, bucket.put(query["name"], body))
        token = str(len(bucket.uploads))
        bucket.uploads[token] = query["name"]
        location = f"https://{HOSTS[0]}/upload/storage/v1/b/{NAME}/o?upload_id={token}"
        return self.reply(200, Location=location)

    def access_object(self, name, query, target, wants_content):
        """Copies an object to `target`, deletes it, or sends its content or metadata."""
        bucket = self.server.bucket
        if name not in bucket.objects:
            return self.reply(404, {"error": {"code": 404, "message": "not found"}})
        if not bucket.matches(name, query):
            return self.reply(412)
        if target:
            other = urllib.parse.unquote(target.removeprefix(f"b/{NAME}/o/"))
            resource = bucket.put(other, bucket.objects[name])
            return self.reply(200, {"done": True, "resource": resource})
        if self.command == "DELETE":
            del bucket.objects[name]
            return self.reply(204)
        if wants_content:
            return self.send_content(bucket.objects[name], bucket.generations[name])
        return self.reply(200, bucket.metadata(name))

    def send_content(self, content, generation):
        """Sends the content of an object, or the range that the request asks for."""
        headers = {"x_goog_generation": str(generation)}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            selected = content[int(first) : int(last) + 1 if last else None]
            if not selected:
                return self.reply(416, **headers)
            end = int(first) + len(selected) - 1
            headers["Content_Range"] = f"bytes {first}-{end}/{len(content)}"
            return self.reply(206, selected, **headers)
        return self.reply(200, content, **headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any


def _certificate():
    """Returns a private key and a self-signed certificate for Google's hosts, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOSTS[0])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in HOSTS]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(encoding)
