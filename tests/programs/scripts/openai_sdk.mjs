// OpenAI's SDK for Node.

import OpenAI from 'openai'
import {assert, check, CHAT, LINE_SEPARATORS, MODEL, PROMPT, tellVersion, TOO_LONG, URL} from './checks.mjs'

tellVersion('openai')
const client = new OpenAI({baseURL: `${URL}/v1`, apiKey: 'sk-none', maxRetries: 0})

await check('the list of models', async () => {
  const models = []
  for await (const model of client.models.list()) models.push(model.id)
  assert.deepEqual(models, [MODEL])
})

await check('a completion, whole and as a stream with usage', async () => {
  const fields = {model: MODEL, prompt: PROMPT, max_tokens: 20, temperature: 0}
  const answer = await client.completions.create(fields)
  assert.equal(answer.usage.completion_tokens, 20)
  let text = '', usage
  for await (const chunk of await client.completions.create({...fields, stream: true, stream_options: {include_usage: true}})) {
    text += chunk.choices[0]?.text ?? ''
    usage = chunk.usage
  }
  assert.equal(text, answer.choices[0].text)
  assert.deepEqual(usage.completion_tokens, 20)
})

await check('a chat, whole and through the stream helper', async () => {
  const fields = {model: MODEL, messages: CHAT, max_tokens: 20, temperature: 0}
  const answer = await client.chat.completions.create(fields)
  const streamed = await client.chat.completions.stream(fields).finalContent()
  assert.equal(streamed, answer.choices[0].message.content)
})

await check('a chat with tools that it may call', async () => {
  const tools = [{type: 'function', function: {name: 'clock', parameters: {type: 'object', properties: {}}}}]
  const answer = await client.chat.completions.create({model: MODEL, messages: CHAT, max_tokens: 8, tools})
  assert.equal(answer.choices[0].message.tool_calls?.length ?? 0, 0)
})

await check('separators of lines in a stream', async () => {
  let text = ''
  const fields = {model: MODEL, prompt: LINE_SEPARATORS, echo: true, max_tokens: 1, stream: true}
  for await (const chunk of await client.completions.create(fields)) text += chunk.choices[0]?.text ?? ''
  assert.ok(text.startsWith(LINE_SEPARATORS), JSON.stringify(text))
})

await check('a prompt that is too long is a BadRequestError with its code', async () => {
  await assert.rejects(client.completions.create({model: MODEL, prompt: TOO_LONG}), error => {
    assert.ok(error instanceof OpenAI.BadRequestError, error)
    assert.equal(error.code, 'context_length_exceeded')
    return true
  })
})
