// promptfoo: an evaluation of two prompts on a completion and on a chat.

import {execFileSync} from 'node:child_process'
import {readFileSync, writeFileSync} from 'node:fs'
import {assert, check, MODEL, tellVersion, URL} from './checks.mjs'

tellVersion('promptfoo')
const config = {apiBaseUrl: `${URL}/v1`, apiKey: 'sk-none', max_tokens: 16}
writeFileSync('promptfooconfig.json', JSON.stringify({
  prompts: ['Tell a tale of {{hero}}.', 'Once upon a time there was {{hero}}'],
  providers: [{id: `openai:completion:${MODEL}`, config}, {id: `openai:chat:${MODEL}`, config}],
  tests: [{vars: {hero: 'a fox'}, assert: [{type: 'javascript', value: 'output.length > 0'}]}, {vars: {hero: 'a king'}}],
}))
const quiet = {PROMPTFOO_DISABLE_TELEMETRY: '1', PROMPTFOO_DISABLE_UPDATE: '1', PROMPTFOO_DISABLE_REMOTE_GENERATION: 'true'}

await check('an evaluation of two prompts, as completions and as chats', () => {
  const options = ['eval', '--config', 'promptfooconfig.json', '--no-cache', '--no-write', '--no-table', '--output', 'out.json']
  execFileSync('promptfoo', options, {env: {...process.env, ...quiet}, stdio: ['ignore', 2, 2], timeout: 240_000})
  const {results} = JSON.parse(readFileSync('out.json', 'utf8'))
  assert.equal(results.results.length, 8)
  for (const {success, error, response} of results.results) assert.ok(success && response.output, error)
})
