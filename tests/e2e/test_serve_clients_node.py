"""Node's official client, two majors of it, unmodified, against a real server on a real socket.

They are no dependency of the project: `python -m tests.clients` fetches them, and where one is absent its test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / "unit" / "serve"), str(Path(__file__).parents[2])]

from api_rig import Rig, clip, png, serving
from tests.clients import FOLDER, NODE, absent, node

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
  for (const video of [remix, edited, longer, sent]) {
    assert.strictEqual((await ended(video.id)).status, 'completed');
    assert.strictEqual(await text(await client.videos.downloadContent(video.id)), `film of ${video.id}`);
  }

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
  const films = [film.id, remix.id, longer.id];
  for (const id of films) {
    const gone = await client.videos.delete(id);
    assert.deepStrictEqual([gone.id, gone.deleted, gone.object], [id, true, 'video.deleted']);
    await refused(() => client.videos.retrieve(id), 404, 'not_found');
    await refused(() => client.videos.downloadContent(id), 404, 'not_found');
  }
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
  console.log(JSON.stringify({ version: require('openai/version').VERSION, deleted: films }));
}
main();
"""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(tmp_path_factory.mktemp("server"), live=True) as rig:
        yield rig


@pytest.mark.parametrize("version", NODE)
def test_nodes_official_client(rig: Rig, version: str, tmp_path: Path) -> None:
    tools = node()
    if tools is None:
        pytest.skip("Node is not installed")
    packages = FOLDER / f"node-{version}" / "node_modules"
    if not packages.exists():
        pytest.skip(absent(f"node-{version}"))
    (tmp_path / "picture.png").write_bytes(png())
    (tmp_path / "clip.mp4").write_bytes(clip())
    (tmp_path / "session.cjs").write_text(SESSION)
    words = [tools[0], "session.cjs", str(rig.client.base_url.join("/v1")), "picture.png", "clip.mp4"]
    environment = {**os.environ, "NODE_PATH": str(packages)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"] == version
    for id in told["deleted"]:
        assert rig.client.get(f"/v1/videos/{id}").status_code == 404, "the client believes that it is gone"
