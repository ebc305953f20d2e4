/** All films that are known here, and the stream that keeps them true. */

import * as api from "../wire/api";
import type { Film } from "../wire/api";
import { Stream } from "../wire/live";
import { brief } from "../wire/words";
import { forget } from "./asked";
import { view } from "./page.svelte";

const PAGE = 100;
const FINAL = new Set(["completed", "failed"]);
/** While no worker is there, the server is asked so often whether one came (milliseconds). */
const LOOK = 5000;
/** A page that nobody has seen for so long stops listening until it is seen again (milliseconds). */
const HIDDEN = 60_000;

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

class Library {
  /** Completed and failed, newest first. */
  finished = $state.raw<Film[]>([]);
  /** Running first, then the queue in its order. */
  active = $state.raw<Film[]>([]);
  /** Null until the first answer. */
  ready = $state(false);
  more = $state(false);
  loading = $state(false);
  away = $state(false);
  paused = $state(false);
  /** No worker is there. */
  idle = $state(false);
  models = $state.raw<api.Model[]>([]);
  /** Counts the previews seen of each film, so that a new one is fetched. */
  previews = $state<Record<string, number>>({});
  /** Films that were asked to stop. */
  stopping = $state<Record<string, boolean>>({});
  private version = $state(0);

  private films = new Map<string, Film>();
  private order: string[] = [];
  /** Films that are deleted: an answer that was on its way before must not bring one back. */
  private gone = new Set<string>();
  private born = new Map<string, number>();
  private ends = new Map<string, number>();
  private pace = new Map<string, { at: number; progress: number }>();
  private dirty = false;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private look: ReturnType<typeof setTimeout> | undefined;
  private refreshing: Promise<void> | null = null;
  private again = false;
  private stream = new Stream({
    open: () => {
      this.away = false;
      void this.start();
    },
    event: (type, data) => this.heard(type, data),
    away: () => (this.away = true),
  });

  begin(): void {
    void this.stream.run();
    addEventListener("online", () => this.stream.retry());
    addEventListener("offline", () => this.stream.renew());
    let hidden: ReturnType<typeof setTimeout> | undefined;
    document.addEventListener("visibilitychange", () => {
      clearTimeout(hidden);
      if (document.hidden) hidden = setTimeout(() => this.stream.rest(), HIDDEN);
      else this.stream.retry();
    });
  }

  /** After a key was given. */
  unlock(): void {
    this.stream.retry();
  }

  film(id: string): Film | undefined {
    void this.version;
    return this.films.get(id);
  }

  /** A film that may not be on any page loaded yet; null when there is none. */
  async find(id: string): Promise<Film | null> {
    const known = this.films.get(id);
    if (known) return known;
    try {
      const film = await api.get(id);
      this.keep(film);
      this.publish();
      return film;
    } catch (error) {
      if (error instanceof api.Refusal && error.status === 404) return null;
      throw error;
    }
  }

  children(id: string): Film[] {
    void this.version;
    return [...this.films.values()].filter((film) => parent(film) === id);
  }

  /** Milliseconds until a film is there, as well as can be told. */
  remaining(film: Film, now: number): number | null {
    const end = this.ends.get(film.id);
    return end === undefined ? null : Math.max(0, end - now);
  }

  /** A film that this page has just asked for. */
  add(film: Film): void {
    if (!this.order.includes(film.id)) {
      this.order.unshift(film.id);
      this.born.set(film.id, performance.now());
    }
    this.keep(film);
    this.publish();
  }

  async next(): Promise<void> {
    if (this.loading || !this.more) return;
    this.loading = true;
    try {
      await this.fetchPage(this.order[this.order.length - 1] ?? null);
    } catch (error) {
      // the film that the page hangs on is gone: begin from the head
      if (error instanceof api.Refusal && error.status !== 401) this.soon();
    } finally {
      this.loading = false;
    }
  }

  async cancel(film: Film): Promise<void> {
    this.stopping[film.id] = true;
    if (!(await this.attempt(async () => this.keep(await api.cancel(film.id))))) delete this.stopping[film.id];
    this.soon();
  }

  async remove(film: Film): Promise<boolean> {
    return this.attempt(async () => {
      await api.remove(film.id).catch((error: unknown) => {
        if (!(error instanceof api.Refusal && error.status === 404)) throw error;
      });
      this.forget(film.id);
    });
  }

  async move(film: Film, place: number): Promise<void> {
    await this.attempt(async () => {
      await api.move(film.id, place);
      await this.refresh();
    });
  }

  async pause(paused: boolean): Promise<void> {
    await this.attempt(async () => this.seen(await api.pause(paused)));
  }

  private async attempt(work: () => Promise<void>): Promise<boolean> {
    try {
      await work();
      this.publish();
      return true;
    } catch (error) {
      view.note(message(error), true);
      return false;
    }
  }

  private async start(): Promise<void> {
    try {
      this.models = await api.models();
    } catch {
      // asked again when the stream stands again
    }
    await this.refresh();
  }

  private seen(queue: api.Queue): void {
    this.paused = queue.paused;
    this.idle = queue.workers === 0;
    clearTimeout(this.look);
    if (this.idle && this.active.length) this.look = setTimeout(() => void this.refresh(), LOOK);
  }

  private soon(): void {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => void this.refresh(), 250);
  }

  /** Reads the head of the list again until it meets what is known; two calls at once become one more round. */
  private refresh(): Promise<void> {
    if (this.refreshing) {
      this.again = true;
      return this.refreshing;
    }
    this.refreshing = (async () => {
      try {
        do {
          this.again = false;
          await this.head();
        } while (this.again);
      } catch {
        // the stream notices when the server is away
      } finally {
        this.refreshing = null;
      }
    })();
    return this.refreshing;
  }

  private async head(): Promise<void> {
    this.seen(await api.queue());
    let cursor: string | null = null;
    for (;;) {
      const { met, last, more, waiting } = await this.fetchPage(cursor);
      if (!more || !last || (met && !waiting)) break;
      cursor = last;
    }
    this.ready = true;
  }

  /** Puts one page of the server's list in its place: what the server no longer lists there is gone. */
  private async fetchPage(after: string | null) {
    const asked = performance.now();
    const page = await api.page(after, PAGE);
    const films = page.data.filter((film) => !this.gone.has(film.id));
    const ids = films.map((film) => film.id);
    const listed = new Set(ids);
    const start = after ? this.order.indexOf(after) + 1 : 0;
    let end = page.has_more ? start : this.order.length;
    let met = ids.length === 0 || this.order.length === 0;
    for (let i = this.order.length - 1; i >= start; i--) {
      if (listed.has(this.order[i]!)) {
        met = true;
        end = Math.max(end, i + 1);
        break;
      }
    }
    const young: string[] = [];
    for (const id of this.order.slice(start, end)) {
      if (listed.has(id)) continue;
      if ((this.born.get(id) ?? -1) > asked) young.push(id);
      else this.films.delete(id);
    }
    const before = this.order.slice(0, start).filter((id) => !listed.has(id));
    const behind = this.order.slice(end).filter((id) => !listed.has(id));
    this.order = [...before, ...young, ...ids, ...behind];
    for (const film of films) this.keep(film);
    if (behind.length === 0) this.more = page.has_more;
    this.dirty = true;
    this.publish();
    const waiting = page.data.length > 0 && !FINAL.has(page.data[page.data.length - 1]!.status);
    return { met, last: page.data[page.data.length - 1]?.id ?? null, more: page.has_more, waiting };
  }

  private heard(type: string, data: Record<string, unknown>): void {
    const id = String(data.id ?? "");
    if (!id.startsWith("video_")) return;
    if (type === "video.deleted") {
      this.forget(id);
      this.publish();
      return;
    }
    if (!this.order.includes(id) || !data.video) {
      this.soon();
      return;
    }
    // an event carries the film as it is now, not as it was when the event was written
    const film = data.video as Film;
    if (type === "video.preview") this.previews[id] = (this.previews[id] ?? 0) + 1;
    this.keep(film);
    this.publish();
    if (type !== "video.progress" && type !== "video.preview") this.soon();
  }

  private keep(film: Film): void {
    if (this.gone.has(film.id)) return;
    const old = this.films.get(film.id);
    if (old && FINAL.has(old.status) && !FINAL.has(film.status)) return;
    if (!old || FINAL.has(film.status)) this.dirty = true;
    this.films.set(film.id, film);
    this.estimate(film);
    if (old && !FINAL.has(old.status) && FINAL.has(film.status)) {
      view.say(film.status === "completed" ? `Film finished: ${brief(film)}` : `Film not made: ${brief(film)}`);
    }
  }

  private estimate(film: Film): void {
    const now = Date.now();
    if (FINAL.has(film.status)) {
      this.ends.delete(film.id);
      this.pace.delete(film.id);
    } else if (typeof film.eta_ms === "number") {
      this.ends.set(film.id, now + film.eta_ms);
    } else if (film.status === "in_progress") {
      const first = this.pace.get(film.id);
      if (!first || first.progress > film.progress) this.pace.set(film.id, { at: now, progress: film.progress });
      else if (film.progress - first.progress >= 5) {
        this.ends.set(film.id, now + ((100 - film.progress) * (now - first.at)) / (film.progress - first.progress));
      }
    }
  }

  private forget(id: string): void {
    forget(id);
    this.gone.add(id);
    this.films.delete(id);
    this.order = this.order.filter((other) => other !== id);
    this.dirty = true;
  }

  private publish(): void {
    const active: Film[] = [];
    const finished: Film[] = [];
    for (const id of this.order) {
      const film = this.films.get(id);
      if (film) (FINAL.has(film.status) ? finished : active).push(film);
    }
    const place = (film: Film) => (film.status === "in_progress" ? 0 : (film.queue_position ?? 1e9));
    active.reverse().sort((a, b) => place(a) - place(b));
    this.active = active;
    if (this.dirty) this.finished = finished;
    this.dirty = false;
    this.version += 1;
  }
}

/** The film that another was made from, if any. */
export function parent(film: Film): string | null {
  return film.parent_id ?? film.remixed_from_video_id ?? null;
}

export const library = new Library();
