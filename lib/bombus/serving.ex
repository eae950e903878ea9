defmodule Bombus.Serving do
  @moduledoc """
  Text from a model: one request, many at once, as a stream, under a supervisor.

      serving = Bombus.Serving.new(model, tokenizer, max_new_tokens: 100)
      Bombus.Serving.run(serving, "Write a post about coffee")
      #=> %{results: [%{text: "...", token_ids: [...], finish_reason: :stop,
      #=>               token_summary: %{input: 18, cached: 0, output: 36, padding: 0}}]}

      serving |> Bombus.Serving.stream("Write a post about coffee") |> Enum.each(&IO.write/1)

  All requests to a model share its batch: sequences join and leave between steps, whichever
  process or serving they come from.

  ## In a supervision tree

      children = [{Bombus.Serving, serving: serving, name: MyLLM}]

      Bombus.Serving.batched_run(MyLLM, "Write a post about coffee")
      Bombus.Serving.stream(MyLLM, "Write a post about coffee")

  It may load the model itself:

      children = [{Bombus.Serving, name: MyLLM, model: {:local, "models/Qwen3-8B-MLX-4bit"}}]

  The named process only holds the serving: requests go from the caller to the engine. When it
  stops, its requests end with `{:error, %Bombus.Error{reason: :stopped}}`; `:drain` gives them time
  to end by themselves. From another node of a cluster, where Bombus is loaded too:

      Bombus.Serving.batched_run({MyLLM, :"llm@host"}, "Write a post about coffee")
      Bombus.Serving.stream({MyLLM, :"llm@host"}, "Write a post about coffee")

  All of a model's requests share its limits (see `Bombus.load_model/2`): `:max_batch_size` sequences run
  together, `:max_queue` requests wait, first come, first served. One more is answered with
  `{:error, %Bombus.Error{reason: :overloaded}}` at once. A serving may have narrower limits of its own.

  ## Loading

  A serving with the source of a model starts at once and loads the model afterwards, so that the start
  of an application waits for no load and no download. `status/1` says how far the load is, and
  `await_ready/2` waits for it. Callers wait too, for as long as their `:timeout` says, or 60 s by
  default. Then they get `{:error, %Bombus.Error{reason: :loading}}`.

  When a load fails, callers get its error, and the load is tried again after 1, 2, 4, ... seconds, at
  most a minute apart. The process lives on meanwhile: a Hub that is down or a file that is missing does
  not use up the restarts of a supervisor. The model is also loaded again when its files change in
  place; requests that meet the change end with `:io`.

  A serving whose model is given is ready at once, and cannot load it again. When the model's files
  change, or `Bombus.unload/2` frees the model, the tokenizer or the adapter, its status stays
  `{:failed, error}`. An adapter that does not fit its model fails the start.

  ## Time

  A request has no time limit unless it has a `:timeout`, in milliseconds. The time counts from the call
  (of a stream, from when it is first read): it includes the wait for a model that loads, the queue, the
  prompt, the text, and in a stream the time of its reader. When it is over, the step that has begun is
  finished, the request ends with `{:error, %Bombus.Error{reason: :timeout}}`, and its place is free.
  `cancel/1` ends the requests of another process, and keeps what there is so far.

  ## Inputs

    * a string: a user's message where the tokenizer has a chat template, else a text to be
      completed
    * `%{text: string}` - the same, with options beside it
    * `%{messages: [%{role: "user", content: "..."}]}` - a conversation, with options beside it
    * `%{token_ids: ids}` - token ids as they are, with options beside it

  A message's content is a string, or a list of parts that are texts, `%{type: "text", text: "..."}`. The
  chat template gets the form that it can show. Where it reads only parts, as templates of
  vision-language models do, a string becomes a list of one part. Where it reads only texts, the parts
  are joined. A template that reads both gets the content as it is.

  A list of inputs gives a list of results, in the same order. Twice as many as the model's batch holds
  are sent to the engine at once; the others wait in the calling process, so that a list may be longer
  than the queue.

  ## Options

  For a serving, and for each request in its map:

  #{Bombus.Options.docs(Bombus.Serving.Options.schema())}
  For a serving alone, and within the limits of its model:

  #{Bombus.Options.docs(Bombus.Serving.Options.limits())}
  Penalties, biases and filters apply in this order: repetition penalty, presence and frequency
  penalty, logit bias, temperature, top_k, top_p, min_p.

  The repository's `generation_config.json` comes before the defaults above: its `repetition_penalty`, and
  where it says `do_sample` also its `temperature`, `top_p`, `top_k` and `min_p`. Otherwise generation is
  greedy.

  ## Errors

  Where a serving does not answer, `batched_run/2` returns and `stream/2` raises an error with one of
  these reasons, and neither exits:

    * `:not_running` - there is no serving of that name
    * `:no_connection` - its node is not connected, or got lost while the request ran
    * `:loading` - it still loads its model
    * `:stopped` - it stops, or has stopped while the request ran
    * `:timeout` - it took longer than its `:timeout`
    * `:overloaded` - the queue is full
    * `:unsupported` - its node has another version of Bombus
    * the reason of a load that has failed

  What the caller's code got wrong raises `ArgumentError`: an unknown option, a value out of range, an
  input of the wrong form, a token id outside the vocabulary. What a visitor may have typed wrongly is an
  error at run time: an empty text or one that is not UTF-8 (`:bad_request`), or one that is too long
  (`:prompt_too_long`). Errors at run time are returned, for a list of inputs in the list of results, and
  raised by streams.

  ## Results

  A result is a map as Bumblebee's. Each entry of `:results` has

    * `:text` - `nil` without a tokenizer
    * `:token_ids` - without the token that ended the text
    * `:token_summary` - `:input` tokens, of which `:cached` were not computed again, `:output` tokens, and
      `:padding`, which is 0
    * `:finish_reason` - `:stop` where the model ended the text or a stop string was found, `:length` at
      `:max_new_tokens` or the end of the context, `:cancelled` where the request was cancelled
    * `:unfinished_thinking` - whether the text ended in the middle of the model's thinking, between
      `<think>` and `</think>`. Then it holds no answer: give more `:max_new_tokens`, or
      `template_options: %{enable_thinking: false}` where the template knows it
    * `:logprobs`, where the option is given - a list of
      `%{token_id: id, logprob: ln p, top: [%{token_id: id, logprob: ln p}]}`. These are the model's own, before
      all of the options above, as `Bombus.score/3` has them

  ## The same answer, alone or in a crowd

  What a request answers depends on its own input, options and seed, and not on what else runs. Only
  rounding differs: alone, in a batch and after a cached beginning, numbers are added up in another
  order. This moves a token's log-probability, and two tokens that are closer than that may change
  places:

    * on `:cpu` by less than 0.0001 in a float32 checkpoint, and by less than 0.005 in one with 16-bit
      numbers, where keys and values are kept in f16 (bounds of the tests; seen: 0.00001 and 0.0015)
    * on MLX's CPU device not at all
    * on an NVIDIA card (an H100) by less than 0.0001 in float32, 0.04 in float16 and 0.15 in bfloat16,
      since products are rounded to the checkpoint's type, and in a prompt the logits too (seen: 0.000004,
      0.02 and 0.06; mlx-lm's own move by 0.018 in float16 there)
    * on a Mac it has not been measured
  """

  alias Bombus.{Error, Model, Native, Tokenizer}
  alias Bombus.Options.Spec
  alias Bombus.Tokenizer.Messages

  alias Bombus.Serving.{
    Batch,
    Chunks,
    Client,
    Deadline,
    Input,
    Loader,
    Options,
    Remote,
    Request,
    Requests,
    Server
  }

  @typedoc "A serving: plain data, made by `new/3`."
  @type t :: %__MODULE__{
          model: Model.t(),
          tokenizer: Tokenizer.t() | nil,
          options: %{atom() => term()},
          limits: %{atom() => pos_integer() | nil},
          group: reference() | nil,
          name: GenServer.name() | nil
        }

  @typedoc "An option of `new/3`."
  @type option :: unquote(Spec.option(Options.schema() ++ Options.limits()))

  @typedoc "An option of a serving in a supervision tree: see `child_spec/1`."
  @type child_option :: unquote(Spec.option(Loader.everything()))

  @typedoc """
  What a request begins with: a string, or a map with one of `:text`, `:messages` and `:token_ids`, and
  options beside it. Names may be strings, as in a map that was JSON.
  """
  @type input ::
          String.t() | text_input() | chat_input() | token_input() | %{String.t() => term()}

  @typedoc "A text: a user's message where there is a chat template, else a beginning to be completed."
  @type text_input :: unquote(Spec.map([text: quote(do: String.t())], Options.schema()))

  @typedoc "A conversation."
  @type chat_input ::
          unquote(Spec.map([messages: quote(do: [Tokenizer.message()])], Options.schema()))

  @typedoc "Token ids as they are."
  @type token_input ::
          unquote(Spec.map([token_ids: quote(do: [Tokenizer.token_id()])], Options.schema()))

  @typedoc "What ends a text: a string or a token id."
  @type stop :: String.t() | Tokenizer.token_id()

  @typedoc """
  What a text must be: a JSON object, JSON that a schema describes (a map, a keyword list or JSON
  text), what a regular expression matches, or what a grammar in llguidance's Lark describes.
  """
  @type format ::
          :json
          | {:json_schema, map() | keyword() | String.t()}
          | {:regex, String.t()}
          | {:grammar, String.t()}

  @typedoc "What a request answers: see \"Results\" above."
  @type result :: %{results: [entry()]}

  @typedoc "One text of a result."
  @type entry :: %{
          required(:text) => String.t() | nil,
          required(:token_ids) => [Tokenizer.token_id()],
          required(:finish_reason) => finish_reason(),
          required(:unfinished_thinking) => boolean(),
          required(:token_summary) => token_summary(),
          optional(:logprobs) => [token_logprobs()]
        }

  @typedoc "Why a text ended."
  @type finish_reason :: :stop | :length | :cancelled

  @typedoc "How many tokens a request had."
  @type token_summary :: %{
          input: non_neg_integer(),
          cached: non_neg_integer(),
          output: non_neg_integer(),
          padding: 0
        }

  @typedoc "The log-probability of a token, and of those that the model found most probable."
  @type token_logprobs :: %{
          token_id: Tokenizer.token_id(),
          logprob: float(),
          top: [%{token_id: Tokenizer.token_id(), logprob: float()}]
        }

  @typedoc "A result, or what went wrong at run time."
  @type answer :: result() | {:error, Error.t()}

  @typedoc "An element of a stream: a text, without a tokenizer a token id; at the end with `:stream_done` the result."
  @type chunk :: String.t() | Tokenizer.token_id() | {:done, result()}

  @typedoc "See `status/1`."
  @type status :: %{
          state: :loading | :ready | {:failed, Error.t()},
          progress: Bombus.Hub.progress() | nil,
          batch: non_neg_integer(),
          queue: non_neg_integer()
        }

  @enforce_keys [:model, :tokenizer, :options, :limits]
  defstruct [:group, :name | @enforce_keys]

  @doc """
  A serving of a model, with the options of all its requests.

  Without a tokenizer (`nil`) only token ids go in and come out. Nothing is started: a serving is
  plain data.
  """
  @spec new(Model.t(), Tokenizer.t() | nil, [option()]) :: t()
  def new(model, tokenizer, options \\ []) do
    model = Bombus.Options.handle!(model, Model)
    table = Options.limits() ++ Options.schema()
    options = Bombus.Options.given!(options, table, "Bombus.Serving.new/3")
    {limits, options} = Keyword.split(options, Keyword.keys(Options.limits()))
    tokenizer = tokenizer!(tokenizer)
    Messages.options_known!(options[:template_options] || %{}, tokenizer)
    narrower? = Enum.any?(limits, fn {_key, limit} -> limit end)
    limits = Model.Options.native_limits(limits)

    serving = %__MODULE__{
      model: model,
      tokenizer: tokenizer,
      options: Options.new!(options, model),
      limits: limits,
      group: if(narrower?, do: Native.new_group(limits))
    }

    Input.check_options!(serving.options, serving)
    serving
  end

  @doc """
  Runs an input, or a list of inputs at once, and returns the result or the results.

  What goes wrong at run time is `{:error, %Bombus.Error{}}`, in a list in its place; so is a prompt that
  is too long (`:prompt_too_long`). `Bombus.Tokenizer.count/2` says beforehand how long one is.
  """
  @spec run(t(), input() | [input()]) ::
          answer() | [answer()] | Enumerable.t(chunk())
  def run(serving, input), do: run_with(serving!(serving, "batched_run/2"), input, nil)

  @doc "As `run/2`, but raises what goes wrong."
  @spec run!(t(), input() | [input()]) :: result() | [result()] | Enumerable.t(chunk())
  def run!(serving, input), do: raise_errors(run(serving, input))

  @doc """
  Runs an input as a stream of text chunks (of token ids where there is no tokenizer).

  The request starts when the stream is first asked, in the process that asks. Only that process can
  read it: in another one, a stream that was suspended raises `ArgumentError`. Halting the stream
  cancels the request, and so does the death of the process. What goes wrong is raised as a
  `Bombus.Error`, a prompt that is too long (`:prompt_too_long`) too.

  A reader that is slower than the model holds nobody up. At most #{Chunks.window()} chunks lie in its mailbox. What is
  generated beyond them comes as one longer chunk, of at most as many tokens again. Then the sequence
  leaves the batch, which another request may use, until the reader goes on.

  `serving` is a serving, or the name of one in a supervision tree.
  """
  @spec stream(t() | GenServer.server(), input()) :: Enumerable.t(chunk())
  def stream(%__MODULE__{} = serving, input),
    do: Chunks.stream(serving!(serving, "stream/2"), Input.normalize!(input, serving), nil)

  def stream(name, input) do
    case Client.checkout(name, timeout(input)) do
      {:ok, serving, server} -> Chunks.stream(serving, Input.normalize!(input, serving), server)
      :cancelled -> []
      {:error, error} -> raise error
    end
  end

  @doc """
  Runs an input, or a list of inputs, on a serving in a supervision tree. Returns what `run/2` does.
  """
  @spec batched_run(GenServer.server(), input() | [input()]) ::
          answer() | [answer()] | Enumerable.t(chunk())
  def batched_run(%__MODULE__{}, _input) do
    raise ArgumentError, "expected the name of a serving; a serving itself goes to run/2"
  end

  def batched_run(name, input) do
    begun = Deadline.now()

    case Client.checkout(name, timeout(input)) do
      {:ok, serving, server} -> run_with(serving, input, server, begun)
      :cancelled -> each(input, Request.cancelled(true))
      {:error, error} -> each(input, {:error, error})
    end
  end

  defp each(inputs, answer) when is_list(inputs), do: Enum.map(inputs, fn _input -> answer end)
  defp each(_input, answer), do: answer

  # How long a model that loads is waited for; of a list, for the input that waits longest.
  defp timeout(inputs) when is_list(inputs),
    do:
      inputs
      |> Input.list!()
      |> Enum.map(&timeout/1)
      |> Enum.max_by(&(&1 || 60_000), fn -> nil end)

  defp timeout(%{timeout: timeout}), do: Options.timeout!(timeout)
  defp timeout(%{"timeout" => timeout}), do: Options.timeout!(timeout)
  defp timeout(_input), do: nil

  @doc """
  Whether a named serving can answer, for health checks: a map of

    * `:state` - `:loading`, `:ready`, or `{:failed, error}` where its model cannot be loaded, its
      files have changed, or what it was given has been unloaded
    * `:progress` - of a download while it is loading, `t:Bombus.Hub.progress/0`; else `nil`
    * `:batch` - how many requests run in the model's batch
    * `:queue` - how many more wait; while it is loading, how many callers wait for that

  It answers at once, also while the model loads. Where there is no serving of this name, the answer is
  `{:error, %Bombus.Error{reason: :not_running}}`, and `:no_connection` where its node is not
  connected.

  ## Examples

      # in a health check
      case Bombus.Serving.status(MyLLM) do
        %{state: :ready} -> send_resp(conn, 200, "ready")
        %{state: :loading} -> send_resp(conn, 503, "loading")
        %{state: {:failed, error}} -> send_resp(conn, 503, Exception.message(error))
        {:error, error} -> send_resp(conn, 503, Exception.message(error))
      end
  """
  @spec status(GenServer.server()) :: status() | {:error, Error.t()}
  def status(name), do: Client.status(name)

  @doc """
  Waits until a named serving has loaded its model: `:ok`, or an error, of which `:loading` says that
  it still loads after `timeout` milliseconds (60 s by default; `:infinity` waits as long as it takes).

      :ok = Bombus.Serving.await_ready(MyLLM, 120_000)
  """
  @spec await_ready(GenServer.server(), timeout()) :: :ok | {:error, Error.t()}
  def await_ready(name, timeout \\ 60_000) do
    case Client.checkout(name, Options.timeout!(timeout)) do
      {:ok, _serving, _server} -> :ok
      :cancelled -> Error.error(:loading, "the wait was cancelled")
      {:error, error} -> {:error, error}
    end
  end

  @doc """
  Cancels all requests that a process has running: a task, or whoever reads a stream, also on another
  node.

  `run/2` and `batched_run/2` then return what there is so far, with `finish_reason: :cancelled`; a
  stream ends there. Of a list, inputs that have not begun are cancelled too. A process without
  requests is left alone. Always `:ok`.

      task = Task.async(fn -> Bombus.Serving.batched_run(MyLLM, "Write a novel") end)
      Bombus.Serving.cancel(task)
      %{results: [%{finish_reason: :cancelled}]} = Task.await(task)
  """
  @spec cancel(pid() | Task.t()) :: :ok
  def cancel(pid) when is_pid(pid), do: Requests.cancel(pid)
  def cancel(%Task{pid: pid}) when is_pid(pid), do: Requests.cancel(pid)

  def cancel(other) do
    raise ArgumentError,
          "expected the process (a pid or a task) whose requests are to end, got: #{inspect(other)}"
  end

  @doc """
  The child specification of a named serving.

  ## Options

  #{Bombus.Options.docs(Bombus.Serving.Loader.schema())}
  With a model go the options of `new/3`, whose `:adapter` may be a source, and with the source of a
  model those of `Bombus.load_model/2`.
  """
  @spec child_spec([child_option()]) :: Supervisor.child_spec()
  def child_spec(options) do
    Loader.check!(options)
    serving = options[:serving]
    if serving != nil, do: serving!(serving, "new/3")
    drain = Keyword.get(options, :drain, 0)

    %{
      id: options[:name],
      start: {Server, :start_link, [&__MODULE__.new/3, Loader.hide_tokens(options)]},
      # With time for the answers to those who are cancelled.
      shutdown: if(drain == :infinity, do: :infinity, else: drain + 5_000)
    }
  end

  @doc "Starts a named serving; see `child_spec/1` for the options."
  @spec start_link([child_option()]) :: GenServer.on_start()
  def start_link(options) do
    %{start: {Server, :start_link, arguments}} = child_spec(options)
    apply(Server, :start_link, arguments)
  end

  defp serving!(%__MODULE__{model: model} = serving, _other_function) do
    _here = Bombus.Options.handle!(model, Model)
    serving
  end

  defp serving!(other, function) do
    raise ArgumentError,
          "expected a serving made by Bombus.Serving.new/3, got: #{inspect(other)} " <>
            "(see also Bombus.Serving.#{function})"
  end

  defp tokenizer!(nil), do: nil
  defp tokenizer!(tokenizer), do: Bombus.Options.handle!(tokenizer, Tokenizer)

  defp run_with(serving, input, server, begun \\ Deadline.now())

  defp run_with(serving, inputs, server, begun) when is_list(inputs) do
    # All inputs are checked before the first one starts.
    normalized = inputs |> Input.list!() |> Enum.map(&Input.normalize!(&1, serving))

    if Enum.any?(inputs, &Input.stream?(&1, serving)) do
      raise ArgumentError, "expected a single input, since a list cannot be streamed"
    end

    answers(normalized, fn inputs ->
      Batch.run(serving, Enum.map(inputs, &{&1, deadline(&1, begun)}), server)
    end)
  end

  defp run_with(serving, input, server, begun) do
    normalized = Input.normalize!(input, serving)

    if Input.stream?(input, serving),
      do: Chunks.stream(serving, normalized, server),
      else: serving |> start(normalized, server, begun) |> collect()
  end

  # Of a list, in the order of its inputs; those that are errors run nowhere.
  defp answers(normalized, run) do
    results = run.(for {:ok, input} <- normalized, do: input)

    {answers, []} =
      Enum.map_reduce(normalized, results, fn
        {:ok, _input}, [result | results] -> {result, results}
        {:error, error}, results -> {{:error, error}, results}
      end)

    answers
  end

  defp start(serving, input, server, begun) do
    with {:ok, input} <- input,
         do: Remote.start(serving, input, server, deadline: deadline(input, begun))
  end

  defp deadline({_prompt, options}, begun), do: Deadline.new(options.timeout, begun)

  defp collect({:ok, request}), do: unwrap(Request.collect(request))
  defp collect({:error, error}), do: {:error, error}

  defp unwrap({:ok, result}), do: result
  defp unwrap({:error, error}), do: {:error, error}

  defp raise_errors(results) when is_list(results), do: Enum.map(results, &raise_errors/1)
  defp raise_errors({:error, error}), do: raise(error)
  defp raise_errors(result), do: result

  defimpl Inspect do
    import Inspect.Algebra

    # The options that are not the defaults.
    def inspect(serving, options) do
      shown =
        [model: serving.model, tokenizer: serving.tokenizer, name: serving.name] ++
          Bombus.Serving.Options.changed(serving.options) ++
          for({key, limit} <- serving.limits, limit, do: {key, limit})

      shown = for {key, value} <- shown, value != nil, do: {key, value}
      concat(["#Bombus.Serving<", to_doc(shown, options), ">"])
    end
  end
end
