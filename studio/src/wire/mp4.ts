/** The settings that tubelet writes into its films: JSON in the comment tag, moov/udta/meta/ilst/©cmt/data. */

import type { Shot } from "./api";

export interface Settings {
  prompt: string;
  /** False: the model read the words as they are. */
  expand?: boolean;
  /** What the model read. */
  text?: string;
  /** The system that made it. */
  model?: string;
  steps?: number;
  guidance?: number;
  /** Of an edit: how much was made anew. */
  strength?: number;
  /** "112x64", width first, as the film is shown. */
  size?: string;
  seconds?: string;
  loop?: boolean;
  shots?: Shot[];
  /** None of a film from words alone; "film" of one with shots or windows; else what was done to which its file does not hold. */
  task?: string;
}

/** As they are written. */
interface Written {
  prompt?: string;
  text?: string;
  system?: string;
  steps?: number;
  guidance?: number;
  strength?: number;
  /** Height and width at which the network worked; a server enlarges the film. */
  size?: [number, number];
  frames?: number;
  fps?: number;
  loop?: boolean;
  /** Words, what the model read, frames. */
  shots?: [string, string, number][];
  /** Which of them begin anew. */
  cuts?: number[];
  task?: string;
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

/** Width and height of the first track, in pixels: the end of its header, as 16.16 numbers. */
function shown(view: DataView): string | undefined {
  let box: [number, number] | null = [0, view.byteLength];
  for (const name of ["moov", "trak", "tkhd"]) {
    box = inside(view, box[0], box[1], name);
    if (!box) return undefined;
  }
  const width = view.getUint16(box[1] - 8);
  const height = view.getUint16(box[1] - 4);
  return width && height ? `${width}x${height}` : undefined;
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
    const inner = (outer.settings ? JSON.parse(outer.settings) : {}) as Written;
    const prompt = outer.prompt ?? inner.prompt;
    if (!prompt) return null;
    const { system: model, steps, guidance, strength, fps, loop, task } = inner;
    const shots = fps && (inner.shots?.length ?? 0) > 1 ? inner.shots : undefined;
    return {
      prompt,
      expand: inner.text !== inner.prompt || inner.text === undefined,
      text: inner.text,
      model,
      steps,
      guidance,
      strength,
      size: shown(view) ?? (inner.size ? `${inner.size[1]}x${inner.size[0]}` : undefined),
      seconds: inner.frames && fps ? String(inner.frames / fps) : undefined,
      loop,
      shots: shots?.map(([words, , frames], index) => ({ prompt: words, seconds: frames / fps!, cut: inner.cuts?.includes(index) })),
      task,
    };
  } catch {
    return null;
  }
}
