/** How numbers and facts are said. */

import type { Film } from "./api";

/** Width and height of "1280x720"; a film of unknown size is taken as square. */
export function sides(size: string | null | undefined): [number, number] {
  const [width, height] = (size ?? "").split("x").map(Number);
  return width && height ? [width, height] : [1, 1];
}

export function aspect(film: Film): number {
  const [width, height] = sides(film.size ?? film.rendered_size);
  return width / height;
}

export function shape(size: string): string {
  const [width, height] = sides(size);
  return width > height ? "Wide" : width < height ? "Tall" : "Square";
}

export function seconds(value: string | number | null | undefined): string {
  const number = Number(value);
  return Number.isFinite(number) && number > 0 ? `${Number(number.toFixed(1))} s` : "";
}

/** A size for the eye. */
export function pixels(size: string): string {
  return size.replace("x", " × ");
}

/** Of some sizes the one of the nearest shape, and of these the one with the nearest number of pixels. */
export function nearestSize(size: string, sizes: readonly string[]): string {
  const [width, height] = sides(size);
  const far = (other: string): [number, number] => {
    const [wide, high] = sides(other);
    return [Math.abs(Math.log((wide * height) / (high * width))), Math.abs(Math.log((wide * high) / (width * height)))];
  };
  const nearer = (a: [number, number], b: [number, number]) => a[0] - b[0] < -0.01 || (Math.abs(a[0] - b[0]) <= 0.01 && a[1] < b[1]);
  return size ? sizes.reduce((a, b) => (nearer(far(b), far(a)) ? b : a)) : sizes[0]!;
}

export function nearestSeconds(seconds: string, lengths: readonly string[]): string {
  const far = (length: string) => Math.abs(Number(length) - Number(seconds));
  return seconds ? lengths.reduce((a, b) => (far(b) < far(a) ? b : a)) : lengths[0]!;
}

export function left(ms: number): string {
  if (ms < 1500) return "nearly done";
  if (ms < 90_000) return `about ${Math.round(ms / 1000)} s left`;
  return `about ${Math.round(ms / 60_000)} min left`;
}

export function ago(unix: number, now: number): string {
  const age = Math.max(0, now / 1000 - unix);
  if (age < 60) return "just now";
  if (age < 3600) return `${Math.floor(age / 60)} min ago`;
  if (age < 86_400) return `${Math.floor(age / 3600)} h ago`;
  return new Date(unix * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

export function title(film: Film): string {
  const words = (film.prompt ?? film.text ?? "").trim();
  return words || "A film without words";
}

export function brief(film: Film, length = 60): string {
  const words = title(film);
  return words.length > length ? words.slice(0, length - 1).trimEnd() + "…" : words;
}

export function fileName(film: Film, ending: string): string {
  const words = title(film)
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .slice(0, 40)
    .replace(/^-|-$/g, "");
  return `${words || "film"}${film.seed == null ? "" : `-${film.seed}`}.${ending}`;
}

const FAILURES: Record<string, string> = {
  cancelled: "You stopped this film.",
  out_of_memory: "The machine ran out of memory. A smaller size or a shorter film needs less.",
  worker_crashed: "The worker stopped several times at this film.",
  storage_full: "The disk is full. Delete films to make room.",
  moderation_blocked: "The words were refused by this server's rules.",
};

export function failure(film: Film): string {
  return FAILURES[film.error?.code ?? ""] ?? film.error?.message ?? "This film could not be made.";
}

/** What was done to the parent to get this film. */
export function verb(film: Film): string {
  switch (film.task) {
    case "extend":
      return film.loop ? "Looped" : "Extended";
    case "edit":
      return "Edited";
    case "connect":
      return "Connected";
    case "blend":
      return "Blended";
    default:
      return "Remixed";
  }
}
