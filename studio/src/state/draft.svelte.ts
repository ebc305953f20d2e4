/** The film that is being thought up: what the composer shows and what it sends. */

import { tick } from "svelte";
import * as api from "../wire/api";
import type { Film, Shot } from "../wire/api";
import { readSettings, type Settings } from "../wire/mp4";
import { brief, nearestSeconds, nearestSize, pixels, seconds } from "../wire/words";
import { recall, remember, type Given, type Inputs, type Role } from "./asked";
import { library, parent } from "./library.svelte";
import { view } from "./page.svelte";

/** What is to be done. All but "create" begin from a clip. */
export type Kind = "create" | "extend" | "remix" | "edit" | "loop" | "connect" | "blend";

export interface Picture {
  file: File;
  url: string;
}

export interface Clip {
  /** A film of this server, or else a file. */
  film: Film | null;
  file: File | null;
  url: string;
  settings: Settings | null;
  /** The model to ask for; empty: the one that made the film, or the default one. */
  model: string;
}

/** What a film and a file say alike of how they were made. */
type Plain = Pick<Partial<Film>, "prompt" | "expand" | "model" | "steps" | "guidance" | "strength" | "loop" | "shots" | "text">;

export interface Card extends Shot {
  id: number;
}

export const EXAMPLES = [
  "A large red ball drops and bounces twice.",
  "A small blue square slides to the right.",
  "A green ring passes behind a wall and comes out again.",
] as const;

const KEPT = "draft";
const SEEDS = 2 ** 31;
/** How much of a clip is made anew by a request that does not say. */
const USUAL = 0.6;
/** Two films with a task that needs both. */
export const TWO: readonly Kind[] = ["connect", "blend"];
let cards = 0;

export function card(prompt = "", seconds = 2, cut = false): Card {
  return { id: ++cards, prompt, seconds, cut };
}

function clipOf(from: Film | File, model = "", settings: Settings | null = null): Clip {
  return from instanceof File
    ? { film: null, file: from, url: URL.createObjectURL(from), settings, model }
    : { film: from, file: null, url: "", settings, model };
}

export function nameOf(clip: Clip, length: number): string {
  return clip.film ? brief(clip.film, length) : clip.file?.name || "your clip";
}

function kindOf(film: Film): Kind {
  switch (film.task) {
    case "extend":
      return film.loop ? "loop" : "extend";
    case "remix":
    case "edit":
    case "connect":
    case "blend":
      return film.task;
    default:
      return "create";
  }
}

/** Seconds of a film as it was made. */
function lasting(film: Film): number {
  return film.num_frames && film.fps ? film.num_frames / film.fps : Number(film.seconds);
}

function random(below: number): number {
  return crypto.getRandomValues(new Uint32Array(1))[0]! % below;
}

function token(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

class Draft {
  kind = $state<Kind>("create");
  prompt = $state("");
  /** The filled-in words, where a person changed them. */
  text = $state<string | null>(null);
  /** What the server made of these words for that model; no text: nothing. */
  filled = $state.raw({ words: "", model: "", text: "" });
  /** All that it made so far: a chat model would say something else when asked again. */
  private readonly known = new Map<string, string>();
  expand = $state(true);
  first = $state.raw<Picture | null>(null);
  last = $state.raw<Picture | null>(null);
  clip = $state.raw<Clip | null>(null);
  second = $state.raw<Clip | null>(null);
  /** Empty: the default one. */
  model = $state("");
  size = $state("");
  seconds = $state("");
  takes = $state(1);
  seed = $state("");
  steps = $state("");
  guidance = $state("");
  strength = $state(0.7);
  loop = $state(false);
  board = $state<Card[] | null>(null);
  sending = $state(false);
  waiting = $state(false);
  advanced = $state(false);
  /** What was asked for and cannot be chosen here, with what was taken instead. */
  unfit = $state({ size: "", seconds: "" });
  private dropped = false;

  constructor() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}") as Record<string, unknown>;
      if (typeof kept.prompt === "string") this.prompt = kept.prompt;
      if (typeof kept.size === "string") this.size = kept.size;
      if (typeof kept.seconds === "string") this.seconds = kept.seconds;
    } catch {
      // nothing was kept
    }
  }

  /** Keeps the words over a reload of this tab. */
  store(): void {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ prompt: this.prompt, size: this.size, seconds: this.seconds }));
    } catch {
      // a browser that keeps nothing still works
    }
  }

  get fresh(): boolean {
    return this.kind === "create";
  }

  get ready(): boolean {
    if (this.board && this.fresh) return this.board.some((shot) => shot.prompt.trim());
    if (TWO.includes(this.kind) && !this.second) return false;
    return this.prompt.trim() !== "";
  }

  get length(): number {
    return (this.board ?? []).reduce((sum, shot) => sum + shot.seconds, 0);
  }

  /** The model that is to read the words; empty: the default one. */
  get reader(): string {
    return this.fresh ? this.model : this.clip?.model || this.clip?.film?.model || "";
  }

  /** Whether what is shown as filled in was made of the words as they are. */
  get current(): boolean {
    return this.filled.words === this.prompt.trim() && this.filled.model === this.reader;
  }

  /** Shows what is known to be read for the words; false: nobody knows yet. */
  look(): boolean {
    const [words, model] = [this.prompt.trim(), this.reader];
    const text = this.known.get(`${model}\n${words}`);
    if (text === undefined) return false;
    this.filled = { words, model, text };
    return true;
  }

  learn(words: string, model: string, text: string): void {
    this.known.set(`${model}\n${words}`, text.trim() === words ? "" : text.trim());
  }

  reset(): void {
    this.clear("clip");
    this.kind = "create";
  }

  clear(slot: Role): void {
    const old = this[slot];
    if (old?.file) URL.revokeObjectURL(old.url);
    this[slot] = null;
    if (slot === "clip") {
      this.unfit = { size: "", seconds: "" };
      this.clear("second");
      this.kind = "create";
    }
  }

  /** Begins from a film of the gallery. */
  from(film: Film, kind: Kind): void {
    this.clear("clip");
    this.clip = clipOf(film);
    this.kind = kind;
    this.board = null;
    this.prompt = film.prompt ?? "";
    this.text = null;
    this.loop = false;
    this.focus();
  }

  /** Takes the nearest of what a model makes where it does not make what was asked for, and says so. */
  fit(sizes: string[], lengths: string[]): void {
    if (sizes.length && !sizes.includes(this.size)) {
      const size = nearestSize(this.size, sizes);
      if (this.size) this.unfit.size = `${pixels(this.size)} is no size of this model: ${pixels(size)} is taken.`;
      this.size = size;
    }
    if (lengths.length && !lengths.includes(this.seconds)) {
      const length = nearestSeconds(this.seconds, lengths);
      // a film is as long as its frames: one that was asked for with 4 s may last 4.1 s
      if (this.seconds && Math.abs(Number(length) - Number(this.seconds)) > 0.2) {
        this.unfit.seconds = `${seconds(this.seconds)} is no length of this model: ${seconds(length)} is taken.`;
      }
      this.seconds = length;
    }
  }

  /** A film once more: the same task, words, settings and inputs. `same`: the same seed, too. */
  async again(film: Film, same: boolean): Promise<void> {
    const kind = kindOf(film);
    const { given = {}, seconds: asked = "" } = recall(film.id) ?? {};
    const fetched = async (one: Given | undefined) => (typeof one === "string" ? await library.find(one) : (one ?? null));
    const base = kind === "create" ? null : await fetched(parent(film) ?? given.clip);
    const other = await fetched(given.second);
    const model = this.model;
    this.reset();
    this.plain(film);
    this.seed = same && film.seed != null ? String(film.seed) : "";
    if (this.seed) this.advanced = true;
    let gone = "";
    if (kind === "create") {
      if (film.size) this.size = film.size;
      if (film.seconds && !this.board) this.seconds = String(Number(film.seconds));
      const pictures = (["first", "last"] as const).filter((slot) => {
        const file = given[slot];
        if (file instanceof File) this[slot] = { file, url: URL.createObjectURL(file) };
        return file === null;
      });
      if (pictures.length) gone = `the ${pictures.join(" and the ")} picture`;
    } else if (base) {
      const own = base instanceof File ? "" : base.model;
      this.clip = clipOf(base, film.model === own ? "" : this.model);
      this.model = model;
      this.kind = kind;
      this.loop = false;
      if (kind === "edit" || kind === "remix" || kind === "blend") this.strength = film.strength ?? USUAL;
      if (TWO.includes(kind) && other) this.second = clipOf(other);
      const before = [base, ...(kind === "connect" ? [other] : [])];
      const lengths = before.map((one) => (one && !(one instanceof File) ? lasting(one) : NaN));
      const added = Number(film.seconds) - lengths.reduce((sum, length) => sum + length, 0);
      if (kind !== "blend" && (asked || added > 0)) this.seconds = asked || String(Number(added.toFixed(3)));
    } else gone = "the clip";
    this.readAs(film);
    this.focus();
    if (gone) view.note(`What the film was made from is not here any more: bring ${gone} again.`, true);
    else view.note(same ? "Everything is as it was, the seed, too." : "Settings taken over, with a fresh seed.");
  }

  /** The settings that a file carries, with a fresh seed. What it was made from is not in it: an edit is set up for the file. */
  load(settings: Settings): void {
    const task = settings.task;
    if (task !== "edit" && task !== "blend") this.reset();
    const model = this.model;
    this.plain(settings);
    this.seed = "";
    if (this.clip && (task === "edit" || task === "blend")) {
      this.clip = { ...this.clip, model: this.model };
      this.model = model;
      this.kind = task;
    } else {
      if (settings.size) this.size = settings.size;
      if (settings.seconds && !this.board) this.seconds = settings.seconds;
    }
    this.readAs(settings);
    this.focus();
    const alone = task === undefined || task === "film";
    view.note(`Settings taken over, with a fresh seed.${alone ? "" : " What the film was made from is not in its file."}`);
  }

  /** Words and numbers. Pictures, clips, shape and length are of the task. */
  private plain(from: Plain): void {
    this.clear("first");
    this.clear("last");
    this.unfit = { size: "", seconds: "" };
    this.prompt = from.prompt ?? "";
    this.text = null;
    // What was told to the model, though its words were not to be filled in, is filled in again.
    this.expand = from.expand !== false || (!!from.text && from.text.trim() !== this.prompt.trim());
    const model = library.models.find((one) => one.id === from.model);
    this.model = model?.system ?? "";
    if (from.model && !model) view.note(`There is no model ${from.model} here: the default one is taken.`, true);
    this.steps = from.steps == null ? "" : String(from.steps);
    this.guidance = from.guidance == null ? "" : String(from.guidance);
    if (from.strength != null) this.strength = from.strength;
    this.loop = from.loop === true;
    this.board = from.shots?.length ? from.shots.map((shot) => card(shot.prompt, shot.seconds, shot.cut)) : null;
    this.takes = 1;
  }

  /** The words are read as they were then. */
  private readAs(from: Pick<Film, "text">): void {
    if (!this.expand || !from.text) return;
    this.learn(this.prompt.trim(), this.reader, from.text);
    this.look();
  }

  /** Pictures become first and last picture, a film the clip to work on, or the second one where two are needed. */
  async take(files: Iterable<File>, slot?: "first" | "last" | "second"): Promise<void> {
    for (const file of files) {
      if (file.type.startsWith("image/")) {
        const place = (slot === "second" ? undefined : slot) ?? (this.first && !this.last && this.dropped ? "last" : "first");
        this.clear(place);
        this[place] = { file, url: URL.createObjectURL(file) };
        this.dropped = place === "first";
        this.loop = false;
        if (place === "last") this.advanced = true;
        if (!this.fresh) this.reset();
      } else if (file.type.startsWith("video/") || /\.(mp4|webm|mov|m4v)$/i.test(file.name)) {
        if (slot === "second" || (TWO.includes(this.kind) && !this.second)) {
          this.clear("second");
          this.second = clipOf(file);
          slot = undefined;
          continue;
        }
        const settings = await readSettings(file).catch(() => null);
        this.clear("clip");
        this.clip = clipOf(file, "", settings);
        this.kind = "extend";
        this.board = null;
        if (settings?.prompt && !this.prompt.trim()) this.prompt = settings.prompt;
      } else {
        view.note(`${file.name || "That"} is neither a picture nor a film.`, true);
        continue;
      }
      slot = undefined;
    }
    this.focus();
  }

  focus(): void {
    queueMicrotask(() => {
      const field = document.querySelector<HTMLTextAreaElement>("#prompt");
      field?.scrollIntoView({ block: "nearest" });
      field?.focus({ preventScroll: true });
    });
  }

  /** Sends all takes. While the server is away they wait, and a second try makes no second film. */
  async send(): Promise<void> {
    if (this.sending || !this.ready) return;
    this.sending = true;
    const base = this.seed.trim() === "" ? random(SEEDS - 4) : Number(this.seed);
    // as the page stands now: while they are sent, the next film may already be thought up
    const wishes = Array.from({ length: this.takes }, (_, take) => this.wish(base + take));
    const clip = this.clip;
    const inputs = this.inputs();
    try {
      for (const wish of wishes) {
        const film = await this.deliver(wish);
        library.add(film);
        remember(film.id, inputs);
        view.say(`Film is in the queue: ${brief(film)}`);
      }
      if (clip && this.clip === clip) this.reset();
      await tick();
      const making = document.querySelector("#making");
      if (matchMedia("(max-width: 1023px)").matches) making?.scrollIntoView({ block: "nearest" });
      else if (making && making.getBoundingClientRect().bottom < 60) view.note("Your film is in the queue.");
    } catch (error) {
      view.note(error instanceof Error ? error.message : String(error), true);
    } finally {
      this.sending = false;
      this.waiting = false;
    }
  }

  private inputs(): Inputs {
    const given: Inputs["given"] = {};
    const roles: Role[] = this.fresh ? ["first", "last"] : TWO.includes(this.kind) ? ["clip", "second"] : ["clip"];
    for (const role of roles) {
      const one = this[role];
      if (one) given[role] = one.file ?? ("film" in one ? one.film!.id : null);
    }
    return { given, seconds: this.seconds };
  }

  private async deliver(wish: api.Wish): Promise<Film> {
    for (;;) {
      try {
        return await api.make(wish);
      } catch (error) {
        const later = error instanceof api.Refusal && (error.code === "draining" || error.code === "rate_limit_exceeded");
        if (!(error instanceof api.Away || later)) throw error;
        this.waiting = true;
        await new Promise((done) => setTimeout(done, 1000));
      }
    }
  }

  private wish(seed: number): api.Wish {
    const words = (this.text ?? this.prompt).trim();
    const plain: Record<string, string | number | boolean> = { prompt: words, seed };
    if (this.steps.trim()) plain.steps = Number(this.steps);
    if (this.guidance.trim()) plain.guidance = Number(this.guidance);
    if (!this.expand || this.text !== null) plain.expand = false;
    else if (this.current && this.filled.text && !(this.fresh && this.board)) plain.text = this.filled.text;
    const clip = this.clip;
    if (clip?.model) plain.model = clip.model;
    if (this.kind === "remix" && clip?.film) {
      return { path: `v1/videos/${clip.film.id}/remix`, body: { ...plain, strength: this.strength }, token: token() };
    }
    const form = new FormData();
    for (const [name, value] of Object.entries(plain)) form.set(name, String(value));
    const video = (name: string, from: Clip | null) => {
      if (from?.film) form.set(`${name}[id]`, from.film.id);
      else if (from?.file) form.set(name, from.file, from.file.name || "film.mp4");
    };
    const send = (path: string): api.Wish => ({ path, body: form, token: token() });
    switch (this.kind) {
      case "extend":
      case "loop":
        video("video", clip);
        if (this.seconds) form.set("seconds", this.seconds);
        if (this.kind === "loop") form.set("loop", "true");
        return send("v1/videos/extensions");
      case "edit":
      case "remix":
        video("video", clip);
        form.set("strength", String(this.strength));
        return send("v1/videos/edits");
      case "connect":
      case "blend":
        video("video", clip);
        video("second_video", this.second);
        form.set("mode", this.kind);
        if (this.kind === "blend") form.set("strength", String(this.strength));
        if (this.kind === "connect" && this.seconds) form.set("seconds", this.seconds);
        return send("v1/videos");
      case "create": {
        const model = this.model || library.models[0]?.id;
        if (model) form.set("model", model);
        if (this.size) form.set("size", this.size);
        if (this.first) form.set("input_reference", this.first.file, this.first.file.name || "first.png");
        if (this.last) form.set("last_reference", this.last.file, this.last.file.name || "last.png");
        if (this.loop) form.set("loop", "true");
        const shots = (this.board ?? []).filter((shot) => shot.prompt.trim());
        if (shots.length) {
          form.set("shots", JSON.stringify(shots.map(({ prompt, seconds, cut }, index) => ({ prompt: prompt.trim(), seconds, cut: index > 0 && cut }))));
          form.set("prompt", shots.map((shot) => shot.prompt.trim()).join(" "));
          form.set("seconds", String(this.length));
        } else if (this.seconds) form.set("seconds", this.seconds);
        return send("v1/videos");
      }
    }
  }
}

export const draft = new Draft();

/** A second film is being chosen for one of these. */
class Picking {
  purpose = $state<"compare" | "connect" | "blend" | null>(null);
  /** The first one; null: the clip of the composer. */
  film = $state.raw<Film | null>(null);

  get name(): string {
    return this.film ? brief(this.film, 40) : draft.clip ? nameOf(draft.clip, 40) : "";
  }

  start(purpose: "compare" | "connect" | "blend", film: Film | null): void {
    view.go("");
    this.purpose = purpose;
    this.film = film;
    queueMicrotask(() => document.querySelector<HTMLElement>(".tile a[tabindex='0']")?.focus());
  }

  stop(): void {
    this.purpose = null;
    this.film = null;
  }

  choose(other: Film): void {
    const { purpose, film } = this;
    this.stop();
    if (!purpose) return;
    if (purpose === "compare") {
      if (film) view.go(`/compare/${film.id}/${other.id}`);
      return;
    }
    if (film) draft.from(film, purpose);
    else if (!draft.clip) return;
    draft.clear("second");
    draft.second = clipOf(other);
    draft.focus();
  }
}

export const picking = new Picking();
