// Draw avatars of 12 DiceBear styles, the classes of the demo model, as raw RGB images.
//
//   node render.mjs --out DIR --count 60000 --seed-prefix train [--size 64]
//
// Writes DIR/images.u8 (uint8 [count, size, size, 3]), labels.u8 (uint8 [count]) and meta.json. Image i shows style
// i % 12 with the seed "PREFIX-i", so the same command draws the same images anywhere.

import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';

// Class names, in class order, and the collection's names for them.
const STYLES = {
  adventurer: 'adventurer',
  'big-ears': 'bigEars',
  'big-smile': 'bigSmile',
  dylan: 'dylan',
  lorelei: 'lorelei',
  micah: 'micah',
  miniavs: 'miniavs',
  notionists: 'notionists',
  'open-peeps': 'openPeeps',
  personas: 'personas',
  'pixel-art': 'pixelArt',
  thumbs: 'thumbs',
};
// One of five backgrounds for every style: large areas that all regions of an image must agree on.
const BACKGROUNDS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'];

function fail(message) {
  console.error(`render.mjs: error: ${message}`);
  process.exit(2);
}

function options() {
  let values;
  try {
    ({ values } = parseArgs({
      options: {
        out: { type: 'string' },
        count: { type: 'string' },
        'seed-prefix': { type: 'string' },
        size: { type: 'string', default: '64' },
      },
    }));
  } catch (error) {
    fail(error.message);
  }
  const usage = 'expected --out DIR --count N --seed-prefix TEXT [--size PIXELS]';
  if (!values.out || !values.count || !values['seed-prefix']) fail(usage);
  const count = Number(values.count);
  const size = Number(values.size);
  if (!Number.isInteger(count) || count < 1) fail(`--count ${values.count}: ${usage}`);
  if (!Number.isInteger(size) || size < 8) fail(`--size ${values.size}: ${usage}`);
  return { out: values.out, count, size, prefix: values['seed-prefix'] };
}

async function modules() {
  try {
    const [{ createAvatar }, collection, { Resvg }] = await Promise.all([
      import('@dicebear/core'),
      import('@dicebear/collection'),
      import('@resvg/resvg-js'),
    ]);
    return { createAvatar, collection, Resvg };
  } catch (error) {
    return fail(`${error.message.split('\n')[0]}; run "npm install" in models/recipe first`);
  }
}

const { out, count, size, prefix } = options();
const { createAvatar, collection, Resvg } = await modules();
const styles = Object.values(STYLES).map((name) => collection[name]);

fs.mkdirSync(out, { recursive: true });
const part = (name) => path.join(out, `.${name}.part`);
const imagesFile = fs.openSync(part('images.u8'), 'w');
const digest = createHash('sha256');
const labels = Buffer.alloc(count);
const rgb = Buffer.alloc(size * size * 3);
for (let i = 0; i < count; i += 1) {
  const label = i % styles.length;
  labels[i] = label;
  const svg = createAvatar(styles[label], { seed: `${prefix}-${i}`, size, backgroundColor: BACKGROUNDS }).toString();
  const { pixels } = new Resvg(svg, {
    fitTo: { mode: 'width', value: size },
    background: '#ffffff',
    font: { loadSystemFonts: false },
  }).render();
  for (let p = 0; p < size * size; p += 1) {
    rgb[3 * p] = pixels[4 * p];
    rgb[3 * p + 1] = pixels[4 * p + 1];
    rgb[3 * p + 2] = pixels[4 * p + 2];
  }
  digest.update(rgb);
  fs.writeSync(imagesFile, rgb);
}
fs.closeSync(imagesFile);
fs.writeFileSync(part('labels.u8'), labels);
const meta = { count, size, seed_prefix: prefix, styles: Object.keys(STYLES), images_sha256: digest.digest('hex') };
fs.writeFileSync(part('meta.json'), `${JSON.stringify(meta, null, 1)}\n`);
for (const name of ['images.u8', 'labels.u8', 'meta.json']) fs.renameSync(part(name), path.join(out, name));
console.log(`${out}: ${count} images of ${size}x${size} in ${styles.length} styles`);
