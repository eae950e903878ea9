defmodule Bombus.Options.Unknown do
  @moduledoc false
  # What is said of an option that is not known: what was meant, or where it belongs.

  # What other libraries call it; where several are meant, the first one that the table has.
  @aliases %{
    max_tokens: [:max_new_tokens],
    max_length: [:max_new_tokens],
    max_completion_tokens: [:max_new_tokens],
    max_output_tokens: [:max_new_tokens],
    max_gen_len: [:max_new_tokens],
    n_predict: [:max_new_tokens],
    num_predict: [:max_new_tokens],
    min_tokens: [:min_new_tokens],
    min_length: [:min_new_tokens],
    n_ctx: [:max_context],
    num_ctx: [:max_context],
    context_length: [:max_context],
    context_size: [:max_context],
    max_model_len: [:max_context],
    sequence_length: [:max_context],
    stop_sequences: [:stop],
    stop_strings: [:stop],
    stop_words: [:stop],
    stop_token_ids: [:stop],
    eos_token_id: [:stop],
    top_logprobs: [:logprobs],
    n_probs: [:logprobs],
    repeat_penalty: [:repetition_penalty],
    temp: [:temperature],
    random_seed: [:seed],
    lora: [:adapter],
    adapters: [:adapter],
    lora_path: [:adapter],
    lora_request: [:adapter],
    adapter_path: [:adapter],
    system: [:messages],
    system_prompt: [:messages],
    conversation: [:messages],
    history: [:messages],
    chat: [:messages],
    role: [:messages],
    prompt: [:text, :prompt],
    input: [:text],
    content: [:text],
    ids: [:token_ids],
    input_ids: [:token_ids],
    tokens: [:token_ids],
    functions: [:tools],
    chat_template_kwargs: [:template_options],
    enable_thinking: [:template_options],
    thinking: [:template_options],
    streaming: [:stream],
    batch_size: [:max_batch_size],
    max_num_seqs: [:max_batch_size],
    max_concurrency: [:max_batch_size],
    queue_size: [:max_queue],
    chunk_size: [:prefill_chunk],
    prompt_cache: [:prefix_cache],
    gpu: [:device],
    device_map: [:device],
    n_gpu_layers: [:device],
    n_threads: [:threads],
    num_threads: [:threads],
    dtype: [:quantization],
    bits: [:quantization],
    quantize: [:quantization],
    load_in_4bit: [:quantization],
    load_in_8bit: [:quantization],
    lora_scale: [:scale],
    alpha: [:scale],
    lora_alpha: [:scale],
    token: [:auth_token],
    hf_token: [:auth_token],
    access_token: [:auth_token],
    branch: [:revision],
    commit: [:revision],
    tag: [:revision],
    subfolder: [:subdir],
    local_files_only: [:offline],
    callback: [:on_progress],
    progress: [:on_progress],
    force: [:overwrite],
    iters: [:iterations],
    steps: [:iterations],
    max_steps: [:iterations],
    lr: [:learning_rate],
    model: [:base_model],
    data: [:training_data],
    dataset: [:training_data],
    output: [:output_path],
    output_dir: [:output_path],
    adapter_output: [:output_path],
    max_len: [:max_seq_length],
    max_sequence_length: [:max_seq_length],
    gradient_accumulation_steps: [:grad_accumulation],
    grad_accumulation_steps: [:grad_accumulation]
  }

  # Where an option belongs that stands in the wrong place.
  @source ~s(the source: {:hf, "owner/name", options})
  @load "Bombus.load_model/2"
  @request "a serving (Bombus.Serving.new/3) or an input"
  @homes %{
    revision: @source,
    subdir: @source,
    auth_token: @source,
    cache_dir: @source,
    offline: @source,
    device: @load,
    backend: @load,
    threads: @load,
    quantization: @load,
    prefix_cache: @load,
    scale: "Bombus.load_adapter/2",
    max_new_tokens: @request,
    min_new_tokens: @request,
    temperature: @request,
    top_p: @request,
    top_k: @request,
    min_p: @request,
    seed: @request,
    stop: @request,
    format: @request,
    stream: @request,
    chat_template: @request,
    template_options: @request,
    adapter: @request
  }

  @doc "One sentence for each of the keys; `names` are those that `what` takes."
  @spec message([term()], [atom()], String.t()) :: String.t()
  def message(keys, names, what), do: Enum.map_join(keys, "; ", &sentence(&1, names, what))

  defp sentence(key, names, what) do
    "unknown option #{show(key)}, " <>
      cond do
        meant = meant(key, names) -> "did you mean #{inspect(meant)}?"
        home = @homes[atom(key)] -> "it belongs to #{home}"
        true -> "#{what} takes #{Enum.map_join(names, ", ", &inspect/1)}"
      end
  end

  @doc "The one of the names that is likely meant by a key, if any."
  @spec meant(term(), [atom()]) :: atom() | nil
  def meant(key, names), do: alias_of(key, names) || closest(key, names)

  # A key may be anything that a map has for one.
  defp show(key), do: inspect(key, limit: 5, printable_limit: 50)

  defp alias_of(key, names) do
    @aliases |> Map.get(atom(key), []) |> Enum.find(&(&1 in names))
  end

  # Text becomes an atom only where there is such an atom.
  defp atom(key) when is_atom(key), do: key

  defp atom(key) when is_binary(key) do
    String.to_existing_atom(key)
  rescue
    _error -> nil
  end

  defp atom(_key), do: nil

  # As near as the Elixir compiler's own suggestions have to be.
  @near 0.77

  defp closest(key, names) when is_atom(key) or is_binary(key) do
    word = key |> to_string() |> String.replace_invalid() |> String.slice(0, 64)
    near = Enum.map(names, &{String.jaro_distance(word, to_string(&1)), &1})

    case Enum.max_by(near, &elem(&1, 0), fn -> {0, nil} end) do
      {distance, name} when distance >= @near -> name
      _far -> nil
    end
  end

  defp closest(_key, _names), do: nil
end
