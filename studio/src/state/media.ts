/** Addresses of pictures and films. With a key they are fetched and held as blobs, since a picture cannot send a header. */

import { address, bytes, content, hasKey, type Variant } from "../wire/api";

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

/** Saves a film as a file of this name; the server's own name for it, its id, would say nothing to a person. */
export async function save(id: string, name: string): Promise<void> {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await bytes(id, "video"));
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
