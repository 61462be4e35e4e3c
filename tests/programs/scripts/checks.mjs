// What the scripts for Node share: see checks.py.

import assert from 'node:assert/strict'
import {readFileSync} from 'node:fs'
import path from 'node:path'

export {assert}
export const URL = process.env.BANDED_URL
export const MODEL = process.env.BANDED_MODEL
export const PROMPT = 'Once upon a time there was a'
export const TOO_LONG = 'and then '.repeat(3000)
export const LINE_SEPARATORS = 'one\u2028two\u2029three\u0085four'
export const CHAT = [{role: 'user', content: 'Tell a tale.'}]

const tell = line => console.log(JSON.stringify(line))

// Tells the version of the package that stands in node_modules.
export function tellVersion(name) {
  const file = path.join(import.meta.dirname, '..', 'node_modules', name, 'package.json')
  tell({version: JSON.parse(readFileSync(file, 'utf8')).version})
}

export async function check(name, run) {
  try {
    await run()
    tell({check: name, error: null})
  } catch (error) {
    console.error(error)
    tell({check: name, error: `${error.name}: ${error.message}`})
  }
}
