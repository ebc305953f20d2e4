/** The film that is being thought up: what the composer shows and what it sends. */

import { tick } from "svelte";
import * as api from "../wire/api";
import type { Film, Shot } from "../wire/api";
import { readSettings, type Settings } from "../wire/mp4";
import { brief } from "../wire/words";
import { library } from "./library.svelte";
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
}

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
let cards = 0;

export function card(prompt = "", seconds = 2): Card {
  return { id: ++cards, prompt, seconds };
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
  /** The words as the server would fill them in. */
  filled = $state("");
  expand = $state(true);
  first = $state.raw<Picture | null>(null);
  last = $state.raw<Picture | null>(null);
  clip = $state.raw<Clip | null>(null);
  second = $state.raw<Film | null>(null);
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
    if ((this.kind === "connect" || this.kind === "blend") && !this.second) return false;
    return this.prompt.trim() !== "";
  }

  get length(): number {
    return (this.board ?? []).reduce((sum, shot) => sum + shot.seconds, 0);
  }

  reset(): void {
    this.clear("clip");
    this.second = null;
    this.kind = "create";
  }

  clear(slot: "first" | "last" | "clip"): void {
    const old = this[slot];
    if (old && "file" in old && old.file) URL.revokeObjectURL(old.url);
    this[slot] = null;
    if (slot === "clip") {
      this.second = null;
      if (this.kind !== "create") this.kind = "create";
    }
  }

  /** Begins from a film of the gallery. */
  from(film: Film, kind: Kind): void {
    this.clear("clip");
    this.clip = { film, file: null, url: "", settings: null };
    this.kind = kind;
    this.board = null;
    this.prompt = film.prompt ?? "";
    this.text = null;
    this.loop = false;
    this.focus();
  }

  /** The settings of a film again, with a fresh seed. */
  reuse(settings: { prompt?: string | null; size?: string | null; seconds?: string | null } & Partial<Film>): void {
    this.reset();
    this.prompt = settings.prompt ?? "";
    this.text = null;
    if (settings.size) this.size = settings.size;
    if (settings.seconds) this.seconds = String(Number(settings.seconds));
    this.steps = settings.steps == null ? "" : String(settings.steps);
    this.guidance = settings.guidance == null ? "" : String(settings.guidance);
    this.loop = settings.loop === true;
    this.board = settings.shots?.length ? settings.shots.map((shot) => card(shot.prompt, shot.seconds)) : null;
    this.seed = "";
    this.focus();
    view.note("Settings taken over, with a fresh seed.");
  }

  /** Pictures become first and last picture, a film the clip to work on. */
  async take(files: Iterable<File>, slot?: "first" | "last"): Promise<void> {
    for (const file of files) {
      if (file.type.startsWith("image/")) {
        const place = slot ?? (this.first && !this.last && this.dropped ? "last" : "first");
        this.clear(place);
        this[place] = { file, url: URL.createObjectURL(file) };
        this.dropped = place === "first";
        this.loop = false;
        if (place === "last") this.advanced = true;
        if (!this.fresh) this.reset();
      } else if (file.type.startsWith("video/") || /\.(mp4|webm|mov|m4v)$/i.test(file.name)) {
        this.clear("clip");
        const settings = await readSettings(file).catch(() => null);
        this.clip = { film: null, file, url: URL.createObjectURL(file), settings };
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
    try {
      for (const wish of wishes) {
        const film = await this.deliver(wish);
        library.add(film);
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
    const clip = this.clip;
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
        form.set("second_video[id]", this.second!.id);
        form.set("mode", this.kind);
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
          form.set("shots", JSON.stringify(shots.map(({ prompt, seconds }) => ({ prompt: prompt.trim(), seconds }))));
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
  film = $state.raw<Film | null>(null);

  start(purpose: "compare" | "connect" | "blend", film: Film): void {
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
    if (!purpose || !film) return;
    if (purpose === "compare") view.go(`/compare/${film.id}/${other.id}`);
    else {
      draft.from(film, purpose);
      draft.second = other;
    }
  }
}

export const picking = new Picking();
