"""Google's XML interface in front of fake-gcs-server, which knows only its reads, lists and deletes.

Those and the whole JSON interface are handed through. A PUT, with a precondition or without, a copy and a multipart
upload are asked of the JSON interface and answered as Google's reference of the XML interface describes. Nobody has
compared the answers with those of Google's own store.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

import aiohttp
from aiohttp import web
from yarl import URL

JSON_PATHS = ("/storage/v1/", "/upload/storage/v1/", "/download/storage/v1/", "/batch/storage/v1")
LIMIT = 1 << 30
"""Bytes of a request's body."""
SMALLEST_PART = 5 << 20
"""Of a multipart upload, unless it is the last one."""
META = "x-goog-meta-"
OF_ONE_CONNECTION = ("host", "connection", "keep-alive", "transfer-encoding", "expect", "date", "server")


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code

    def answer(self) -> web.Response:
        return answer("Error", {"Code": self.code, "Message": f"{self.code}, says the translator."}, status=self.status)


@dataclass
class Upload:
    """A multipart upload that is not complete."""

    bucket: str
    name: str
    metadata: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class Translator:
    def __init__(self, upstream: str, session: aiohttp.ClientSession) -> None:
        self._upstream, self._session = upstream, session
        self._uploads: dict[str, Upload] = {}

    async def serve(self, request: web.Request) -> web.Response:
        bucket, _, name = (unquote(part) for part in request.raw_path.split("?")[0][1:].partition("/"))
        if request.path.startswith(JSON_PATHS):
            return await self._hand_through(request)
        try:
            return await self._verb(request, name)(request, bucket, name)
        except Refused as error:
            return error.answer()

    def _verb(self, request: web.Request, name: str) -> Callable[[web.Request, str, str], Awaitable[web.Response]]:
        words = request.query
        if request.method == "PUT" and name:
            if "uploadId" in words:
                return self._take_part
            return self._copy if "x-goog-copy-source" in request.headers else self._put
        if request.method == "POST" and name:
            return self._begin if "uploads" in words else self._complete
        if request.method == "DELETE" and "uploadId" in words:
            return self._abort
        if request.method == "GET" and not name:
            return self._list_uploads if "uploads" in words else self._list
        return self._read

    async def _put(self, request: web.Request, bucket: str, name: str) -> web.Response:
        generation = request.headers.get("x-goog-if-generation-match")
        made = await self._insert(bucket, name, await request.read(), metadata(request), generation)
        return web.Response(headers=version(made))

    async def _copy(self, request: web.Request, bucket: str, name: str) -> web.Response:
        if "x-goog-if-generation-match" in request.headers:
            raise Refused(501, "NotImplemented")
        source, _, path = request.headers["x-goog-copy-source"].lstrip("/").partition("/")
        to = f"rewriteTo/b/{quoted(bucket)}/o/{quoted(name)}"
        status, said = await self._ask("POST", f"/storage/v1/b/{source}/o/{quoted(unquote(path))}/{to}")
        if status == 404:
            raise Refused(404, "NoSuchKey")
        made = said["resource"]
        result = {"LastModified": made["updated"], "ETag": version(made)["ETag"]}
        return answer("CopyObjectResult", result, headers=version(made))

    async def _begin(self, request: web.Request, bucket: str, name: str) -> web.Response:
        await self._look_for(bucket)
        key = uuid.uuid4().hex
        self._uploads[key] = Upload(bucket, name, metadata(request))
        return answer("InitiateMultipartUploadResult", {"Bucket": bucket, "Key": name, "UploadId": key})

    def _upload(self, request: web.Request, bucket: str, name: str) -> Upload:
        upload = self._uploads.get(request.query["uploadId"])
        if upload is None or (upload.bucket, upload.name) != (bucket, name):
            raise Refused(404, "NoSuchUpload")
        return upload

    async def _take_part(self, request: web.Request, bucket: str, name: str) -> web.Response:
        number, data = int(request.query["partNumber"]), await request.read()
        if not 1 <= number <= 10_000:
            raise Refused(400, "InvalidArgument")
        self._upload(request, bucket, name).parts[number] = data
        return web.Response(headers={"ETag": part_tag(data)})

    async def _complete(self, request: web.Request, bucket: str, name: str) -> web.Response:
        asked = ElementTree.fromstring(await request.read())
        upload = self._upload(request, bucket, name)
        parts = upload.parts
        wanted = [(int(part.findtext("PartNumber", "0")), part.findtext("ETag", "")) for part in asked.iter("Part")]
        numbers = [number for number, _ in wanted]
        if not wanted or numbers != sorted(set(numbers)):
            raise Refused(400, "InvalidPartOrder" if wanted else "MalformedXML")
        if any(number not in parts or part_tag(parts[number]) != tag for number, tag in wanted):
            raise Refused(400, "InvalidPart")
        if any(len(parts[number]) < SMALLEST_PART for number in numbers[:-1]):
            raise Refused(400, "EntityTooSmall")
        made = await self._insert(bucket, name, b"".join(parts[number] for number in numbers), upload.metadata)
        self._uploads.pop(request.query["uploadId"], None)
        result = {"Location": str(request.url), "Bucket": bucket, "Key": name, "ETag": version(made)["ETag"]}
        return answer("CompleteMultipartUploadResult", result, headers=version(made))

    async def _abort(self, request: web.Request, bucket: str, name: str) -> web.Response:
        self._upload(request, bucket, name)
        del self._uploads[request.query["uploadId"]]
        return web.Response(status=204)

    async def _list_uploads(self, request: web.Request, bucket: str, name: str) -> web.Response:
        await self._look_for(bucket)
        names = sorted(upload.name for upload in self._uploads.values() if upload.bucket == bucket)
        body = "".join(f"<Upload><Key>{escape(name)}</Key></Upload>" for name in names)
        return web.Response(text=f"<ListMultipartUploadsResult>{body}</ListMultipartUploadsResult>")

    async def _list(self, request: web.Request, bucket: str, name: str) -> web.Response:
        await self._look_for(bucket)  # without one the emulator has a fault of its own
        return await self._hand_through(request)

    async def _read(self, request: web.Request, bucket: str, name: str) -> web.Response:
        found = await self._hand_through(request)
        if found.status == 404:  # which is text there
            await self._look_for(bucket)
            raise Refused(404, "NoSuchKey")
        return found

    async def _look_for(self, bucket: str) -> None:
        if (await self._ask("GET", f"/storage/v1/b/{quoted(bucket)}"))[0] == 404:
            raise Refused(404, "NoSuchBucket")

    async def _insert(
        self, bucket: str, name: str, data: bytes, words: Mapping[str, str], generation: str | None = None
    ) -> dict[str, Any]:
        """Of the emulator's three ways to upload, the one that knows preconditions."""
        mark = uuid.uuid4().hex
        about = json.dumps({"name": name, "metadata": words}).encode()
        head = b"--%b\r\nContent-Type: application/json\r\n\r\n%b\r\n" % (mark.encode(), about)
        body = b"%b--%b\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n--%b--" % (
            head, mark.encode(), data, mark.encode(),
        )  # fmt: skip
        condition = "" if generation is None else f"&ifGenerationMatch={generation}"
        path = f"/upload/storage/v1/b/{quoted(bucket)}/o?uploadType=multipart{condition}"
        status, said = await self._ask("POST", path, body, {"Content-Type": f"multipart/related; boundary={mark}"})
        if status in (404, 412):
            raise Refused(status, "NoSuchBucket" if status == 404 else "PreconditionFailed")
        return said

    async def _ask(
        self, method: str, path: str, body: bytes = b"", fields: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer of the JSON interface; what neither is well nor expected is an error of this server."""
        url = URL(self._upstream + path, encoded=True)
        async with self._session.request(method, url, data=body, headers=fields) as found:
            if found.status >= 400 and found.status not in (404, 412):
                raise Refused(500, f"{found.status} {await found.text()}")
            return found.status, await found.json()

    async def _hand_through(self, request: web.Request) -> web.Response:
        url = URL(self._upstream + request.raw_path, encoded=True)
        fields = {name: value for name, value in request.headers.items() if name.lower() not in OF_ONE_CONNECTION}
        async with self._session.request(request.method, url, data=await request.read(), headers=fields) as found:
            body = await found.read()
            kept = {name: value for name, value in found.headers.items() if name.lower() not in OF_ONE_CONNECTION}
            return web.Response(status=found.status, body=body or None, headers=kept)


def answer(
    root: str, fields: Mapping[str, str], status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    inside = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
    text = f"<?xml version='1.0' encoding='UTF-8'?><{root}>{inside}</{root}>"
    return web.Response(status=status, text=text, content_type="application/xml", headers=headers)


def metadata(request: web.Request) -> dict[str, str]:
    """What the client wants to be kept with an object."""
    fields = ((name.lower(), value) for name, value in request.headers.items())
    return {name.removeprefix(META): value for name, value in fields if name.startswith(META)}


def version(made: Mapping[str, Any]) -> dict[str, str]:
    """What the head of an answer says of an object, as the JSON interface describes it."""
    return {"ETag": f'"{made["etag"]}"', "x-goog-generation": str(made["generation"])}


def part_tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def quoted(name: str) -> str:
    return quote(name, safe="")


async def main(upstream: str) -> None:
    own = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
    async with aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=own) as session:
        app = web.Application(client_max_size=LIMIT)
        app.router.add_route("*", "/{path:.*}", Translator(upstream, session).serve)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
