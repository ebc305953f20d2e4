/** The settings that tubelet writes into its films: JSON in the comment tag, moov/udta/meta/ilst/©cmt/data. */

export interface Settings {
  prompt: string;
  seed?: number;
  steps?: number;
  guidance?: number;
  frames?: number;
  fps?: number;
}

const LARGEST = 128 * 2 ** 20;
const TAG = "\u00a9cmt";

function inside(view: DataView, start: number, end: number, name: string): [number, number] | null {
  let at = start;
  while (at + 8 <= end) {
    let size = view.getUint32(at);
    const type = String.fromCharCode(...[4, 5, 6, 7].map((i) => view.getUint8(at + i)));
    let head = 8;
    if (size === 1 && at + 16 <= end) {
      size = Number(view.getBigUint64(at + 8));
      head = 16;
    } else if (size === 0) size = end - at;
    if (size < head || at + size > end) return null;
    if (type === name) return [at + head, at + size];
    at += size;
  }
  return null;
}

/** Null when the file is not an mp4 or was not made by tubelet. */
export async function readSettings(file: Blob): Promise<Settings | null> {
  if (file.size > LARGEST) return null;
  const view = new DataView(await file.arrayBuffer());
  let box: [number, number] | null = [0, view.byteLength];
  for (const name of ["moov", "udta", "meta", "ilst", TAG, "data"]) {
    // meta is a full box: a version and flags stand before what it holds
    const skip: number = name === "ilst" ? 4 : 0;
    box = inside(view, box[0] + skip, box[1], name);
    if (!box) return null;
  }
  try {
    const text = new TextDecoder().decode(new Uint8Array(view.buffer, box[0] + 8, box[1] - box[0] - 8));
    const outer = JSON.parse(text) as { prompt?: string; settings?: string };
    const inner = (outer.settings ? JSON.parse(outer.settings) : {}) as Partial<Settings>;
    const prompt = outer.prompt ?? inner.prompt;
    if (!prompt) return null;
    const { seed, steps, guidance, frames, fps } = inner;
    return { prompt, seed, steps, guidance, frames, fps };
  } catch {
    return null;
  }
}
