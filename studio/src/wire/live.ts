/** One stream of events that mends itself: it goes on after the last event seen, however long the server was away. */

import { ask, Away, Refusal } from "./api";

export interface Listener {
  /** The stream stands. Events may have been missed before it. */
  open(): void;
  event(type: string, data: Record<string, unknown>): void;
  /** The server does not answer; it is tried again. */
  away(): void;
}

/** A server that says nothing for so long is asked again (milliseconds). */
const SILENCE = 45_000;
const WAITS = [200, 500, 1000, 2000, 3000];

export class Stream {
  private last = "";
  private resting = false;
  private cut: AbortController | null = null;
  private wake: (() => void) | null = null;

  constructor(private readonly listener: Listener) {}

  async run(): Promise<void> {
    let tries = 0;
    for (;;) {
      try {
        await this.once(() => (tries = 0));
      } catch (error) {
        if (error instanceof Refusal && error.status === 401) await this.woken(600_000);
      }
      if (this.resting) {
        await this.woken(2 ** 31 - 1);
        tries = 0;
        continue;
      }
      if (tries > 0) this.listener.away();
      await this.woken(WAITS[Math.min(tries, WAITS.length - 1)]!);
      tries += 1;
    }
  }

  /** Try again at once: the key is there, or the page is seen again. */
  retry(): void {
    this.resting = false;
    this.wake?.();
  }

  /** Ask anew: the network has changed, and a connection that leads nowhere any more says nothing. */
  renew(): void {
    this.cut?.abort();
  }

  /** Hang up until `retry`: a browser has only six connections to a server, for all its tabs. */
  rest(): void {
    this.resting = true;
    this.cut?.abort();
  }

  private woken(wait: number): Promise<void> {
    return new Promise((done) => {
      const timer = setTimeout(done, wait);
      this.wake = () => {
        clearTimeout(timer);
        done();
      };
    });
  }

  private async once(opened: () => void): Promise<void> {
    const cut = (this.cut = new AbortController());
    let timer = setTimeout(() => cut.abort(), SILENCE);
    try {
      const headers: Record<string, string> = { Accept: "text/event-stream" };
      if (this.last) headers["Last-Event-ID"] = this.last;
      const answer = await ask("v1/videos/events", { headers, signal: cut.signal, cache: "no-store" });
      if (!answer.body) throw new Away();
      opened();
      this.listener.open();
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(timer);
        timer = setTimeout(() => cut.abort(), SILENCE);
        text = (text + value).replace(/\r\n?/g, "\n");
        const blocks = text.split("\n\n");
        text = blocks.pop()!;
        for (const block of blocks) this.read(block);
      }
    } finally {
      clearTimeout(timer);
      cut.abort();
    }
  }

  private read(block: string): void {
    let type = "";
    const data: string[] = [];
    for (const line of block.split("\n")) {
      const at = line.indexOf(":");
      if (at === 0) continue;
      const name = at < 0 ? line : line.slice(0, at);
      const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
      if (name === "id") this.last = value;
      else if (name === "event") type = value;
      else if (name === "data") data.push(value);
    }
    if (!data.length) return;
    try {
      const said = JSON.parse(data.join("\n")) as Record<string, unknown>;
      this.listener.event(String(said.type ?? type), said);
    } catch {
      // a line that is no JSON says nothing about a film
    }
  }
}

