/** Addresses of pictures and films. With a key they are fetched and held as blobs, since a picture cannot send a header. */

import { address, bytes, content, hasKey, type Film, type Kept, type Variant } from "../wire/api";
import { fileName } from "../wire/words";

const KEPT = 300;
const held = new Map<string, Promise<string>>();

async function fetched(id: string, variant: Variant): Promise<string> {
  return URL.createObjectURL(await bytes(id, variant));
}

/** The address of one variant of a film; the same question again costs nothing. */
export function source(id: string, variant: Variant): Promise<string> | string {
  if (!hasKey()) return address(content(id, variant));
  const name = `${id}/${variant}`;
  let found = held.get(name);
  if (!found) {
    found = fetched(id, variant);
    found.catch(() => held.delete(name));
  } else held.delete(name);
  held.set(name, found);
  if (held.size > KEPT) {
    const [oldest, url] = held.entries().next().value!;
    held.delete(oldest);
    void url.then((text) => URL.revokeObjectURL(text)).catch(() => {});
  }
  return found;
}

/** Saves a file under this name; the server's own name for a film, its id, would say nothing to a person. */
export function save(file: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export async function saveFilm(film: Film, kind: Kept = "video"): Promise<void> {
  save(await bytes(film.id, kind), fileName(film, kind === "video" ? "mp4" : kind));
}
