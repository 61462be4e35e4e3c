// The AI SDK, with its provider for servers that speak OpenAI's API and with that for OpenAI.

import {createOpenAI} from '@ai-sdk/openai'
import {createOpenAICompatible} from '@ai-sdk/openai-compatible'
import {generateText, jsonSchema, streamText, tool} from 'ai'
import {assert, check, MODEL, PROMPT, tellVersion, TOO_LONG, URL} from './checks.mjs'

tellVersion('ai')
globalThis.AI_SDK_LOG_WARNINGS = false
const compatible = createOpenAICompatible({name: 'banded', baseURL: `${URL}/v1`, apiKey: 'sk-none', includeUsage: true})
const openai = createOpenAI({baseURL: `${URL}/v1`, apiKey: 'sk-none'})
const AT_ONCE = {maxRetries: 0, maxOutputTokens: 20, temperature: 0}
const models = {
  'openai-compatible, completion': compatible.completionModel(MODEL),
  'openai-compatible, chat': compatible.chatModel(MODEL),
  'openai, completion': openai.completion(MODEL),
  'openai, chat': openai.chat(MODEL),
}

for (const [name, model] of Object.entries(models)) {
  await check(`${name}: whole and as a stream, with usage`, async () => {
    const {text, usage} = await generateText({model, prompt: PROMPT, ...AT_ONCE})
    assert.ok(usage.outputTokens > 0 && usage.outputTokens <= 20, JSON.stringify(usage))
    const streamed = streamText({model, prompt: PROMPT, ...AT_ONCE, onError: ({error}) => { throw error }})
    assert.equal(await streamed.text, text)
    assert.equal((await streamed.usage).outputTokens, usage.outputTokens)
  })
}

await check('a chat with tools that it may call', async () => {
  const clock = tool({description: 'the time', inputSchema: jsonSchema({type: 'object', properties: {}}), execute: () => 'noon'})
  const {toolCalls} = await generateText({model: models['openai-compatible, chat'], prompt: PROMPT, ...AT_ONCE, tools: {clock}})
  assert.equal(toolCalls.length, 0)
})

await check('a prompt that is too long is an APICallError with the numbers', async () => {
  await assert.rejects(generateText({model: models['openai-compatible, chat'], prompt: TOO_LONG, ...AT_ONCE}), error => {
    assert.equal(error.statusCode, 400)
    assert.match(error.message, /2048/)
    return true
  })
})
