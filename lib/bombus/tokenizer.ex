defmodule Bombus.Tokenizer do
  alias Bombus.{Error, Native, Options}
  alias Bombus.Tokenizer.Messages

  @template_options [
    template_options: [
      type: {:custom, {Messages, :check_options}},
      type_spec: quote(do: Bombus.Tokenizer.template_options()),
      default: %{},
      doc: "what the chat template takes, such as `%{enable_thinking: false}`"
    ]
  ]
  @encode [
    add_special_tokens: [
      type: :boolean,
      default: true,
      doc: """
      with the tokens that the tokenizer puts around a text, such as `<s>`. A text that begins with
      that token gets no second one
      """
    ]
  ]
  @decode [
    skip_special_tokens: [
      type: :boolean,
      default: true,
      doc: "`false` writes special tokens such as `<|im_end|>` as they are"
    ]
  ]
  @apply [
           tokenize: [
             type: :boolean,
             default: false,
             doc: "`true` gives token ids in place of the text"
           ],
           add_generation_prompt: [
             type: :boolean,
             default: true,
             doc: "`false` leaves out what begins the model's answer"
           ]
         ] ++ @template_options

  @moduledoc """
  A tokenizer, made by `Bombus.load_tokenizer/2`: text to token ids and back.

      {:ok, tokenizer} = Bombus.load_tokenizer(:demo)
      {:ok, ids} = Bombus.Tokenizer.encode(tokenizer, "A post about coffee")
      {:ok, "A post about coffee"} = Bombus.Tokenizer.decode(tokenizer, ids)

      # How many tokens a request takes, before it is made
      messages = [%{role: "user", content: "Write a post about coffee"}]
      {:ok, 18} = Bombus.Tokenizer.count(tokenizer, messages)

  Its fields:

    * `:vocab_size` - how many tokens it knows, special ones included
    * `:chat_template?` - whether it comes with a chat template; then a string given to a serving is
      a user's message, and without one a text to be completed
    * `:template_options` - the names that the chat template takes: `:template_options` of a request
      are among them. Beside them, every template takes `add_generation_prompt`,
      `continue_final_message` and `chat_template`
    * `:bos_token`, `:eos_token` - the special tokens that begin and end a text, or `nil`

  ## Files

  A folder has `tokenizer.json`, or the `vocab.json` and `merges.txt` of a tokenizer of Qwen2's or GPT-2's
  kind. Special tokens come from `tokenizer_config.json`, `special_tokens_map.json` and
  `added_tokens.json`, as in transformers. Chat templates come from `tokenizer_config.json`, from
  `chat_template.jinja`, and by their names from at most 100 files `additional_chat_templates/*.jinja`,
  which are downloaded too. `truncation` and `padding` in `tokenizer.json` are not applied.

  ## Errors

  The functions here return `{:error, %Bombus.Error{}}` for what is wrong with a text or a
  conversation (`:bad_request`, `:prompt_too_long`), and raise `ArgumentError` for what is wrong with
  the call. Each has a twin with `!` that raises both. None of them blocks a scheduler: long texts
  have threads of their own, and end with their caller.
  """

  @typedoc "A loaded tokenizer."
  @type t :: %__MODULE__{
          vocab_size: pos_integer(),
          chat_template?: boolean(),
          template_options: [String.t()],
          bos_token: String.t() | nil,
          eos_token: String.t() | nil,
          ref: reference()
        }

  @typedoc "The number of a token."
  @type token_id :: non_neg_integer()

  @typedoc """
  A message of a conversation. Names may be strings, as in what was JSON, and there may be others that
  the chat template takes; a list of pairs keeps its order. A message that only calls tools has no
  `:content`.
  """
  @type message ::
          %{
            required(:role) => role(),
            optional(:content) => content(),
            optional(atom()) => term()
          }
          | %{required(String.t()) => term()}
          | [{atom() | String.t(), term()}]

  @typedoc "`\"system\"`, `\"user\"`, `\"assistant\"`, `\"tool\"`, or what else the chat template knows."
  @type role :: String.t() | atom()

  @typedoc "A text, or parts that are texts."
  @type content :: String.t() | [part()] | nil

  @typedoc "A part of a content, which is a text."
  @type part :: %{type: String.t(), text: String.t()} | %{required(String.t()) => String.t()}

  @typedoc "What a chat template takes, by the names that it knows."
  @type template_options :: %{optional(atom() | String.t()) => term()} | keyword()

  @typedoc "An option of `encode/3`."
  @type encode_option :: unquote(Options.Spec.option(@encode))

  @typedoc "An option of `decode/3`."
  @type decode_option :: unquote(Options.Spec.option(@decode))

  @typedoc "An option of `count/3` and `fit/4`."
  @type template_option :: unquote(Options.Spec.option(@template_options))

  @typedoc "An option of `apply_chat_template/3`."
  @type apply_option :: unquote(Options.Spec.option(@apply))

  @typedoc "A text or a conversation, as `count/3` takes it."
  @type countable ::
          String.t()
          | [message()]
          | %{required(:text) => String.t(), optional(atom()) => term()}
          | %{required(:messages) => [message()], optional(atom()) => term()}
          | %{required(String.t()) => term()}

  @behaviour Bombus.Handle

  @derive {Inspect, except: [:ref]}
  @enforce_keys [:ref, :vocab_size, :chat_template?]
  defstruct [:bos_token, :eos_token, template_options: []] ++ @enforce_keys

  @doc false
  @impl Bombus.Handle
  def handle, do: {:tokenizer, "a tokenizer", "Bombus.load_tokenizer/2"}

  @doc """
  The token ids of a text, as it stands: no chat template is applied.

  ## Options

  #{Options.docs(@encode)}
  ## Examples

      {:ok, ids} = Bombus.Tokenizer.encode(tokenizer, "A post about coffee")
      {:ok, logprobs} = Bombus.score(model, ids)
  """
  @spec encode(t(), String.t(), [encode_option()]) ::
          {:ok, [token_id()]} | {:error, Error.t()}
  def encode(tokenizer, text, options \\ []) do
    options = Options.validate!(options, @encode, "Bombus.Tokenizer.encode/3")
    tokenizer = tokenizer!(tokenizer)
    with {:ok, prompt} <- text(text), do: ids(tokenizer, prompt, options[:add_special_tokens])
  end

  @doc "As `encode/3`, but returns the ids or raises."
  @spec encode!(t(), String.t(), [encode_option()]) :: [token_id()]
  def encode!(tokenizer, text, options \\ []),
    do: Error.unwrap!(encode(tokenizer, text, options))

  @doc """
  The text of token ids. An id without a token, of which a model may have some, has no text; bytes
  that are no characters become `�`.

  ## Options

  #{Options.docs(@decode)}
  """
  @spec decode(t(), [token_id()], [decode_option()]) ::
          {:ok, String.t()} | {:error, Error.t()}
  def decode(tokenizer, ids, options \\ []) do
    options = Options.validate!(options, @decode, "Bombus.Tokenizer.decode/3")
    tokenizer = tokenizer!(tokenizer)
    ids = for id <- ids!(ids), into: <<>>, do: <<id::native-32>>
    Native.await(&Native.decode(tokenizer.ref, ids, options[:skip_special_tokens], &1))
  end

  @doc "As `decode/3`, but returns the text or raises."
  @spec decode!(t(), [token_id()], [decode_option()]) :: String.t()
  def decode!(tokenizer, ids, options \\ []), do: Error.unwrap!(decode(tokenizer, ids, options))

  @doc """
  How many tokens a text or a conversation has: what a request's `token_summary.input` will be.

    * a string - the text as it stands, as `encode/3` takes it and as a serving takes it with
      `chat_template: false`
    * a list of messages - the conversation, with the chat template around it
    * `%{text: string}` or `%{messages: list}` - an input, as a serving takes it, its names atoms or
      strings: a text is a user's message where the tokenizer has a chat template

  ## Options

  #{Options.docs(@template_options)}
  ## Examples

      {:ok, count} = Bombus.Tokenizer.count(tokenizer, [%{role: "user", content: text}])
      if count + 256 <= model.spec.context, do: Bombus.Serving.run(serving, text)
  """
  @spec count(t(), countable(), [template_option()]) ::
          {:ok, non_neg_integer()} | {:error, Error.t()}
  def count(tokenizer, input, options \\ []) do
    options = Options.validate!(options, @template_options, "Bombus.Tokenizer.count/3")
    tokenizer = tokenizer!(tokenizer)
    with {:ok, prompt} <- prompt(input, tokenizer, options), do: count_prompt(tokenizer, prompt)
  end

  @doc "As `count/3`, but returns the number or raises."
  @spec count!(t(), countable(), [template_option()]) ::
          non_neg_integer()
  def count!(tokenizer, input, options \\ []), do: Error.unwrap!(count(tokenizer, input, options))

  @doc """
  A conversation as the text that the model sees.

  ## Options

  #{Options.docs(@apply)}
  ## Examples

      messages = [%{role: "user", content: "Hello"}]
      {:ok, text} = Bombus.Tokenizer.apply_chat_template(tokenizer, messages)
      {:ok, ids} = Bombus.Tokenizer.apply_chat_template(tokenizer, messages, tokenize: true)
  """
  @spec apply_chat_template(t(), [message()], [apply_option()]) ::
          {:ok, String.t() | [token_id()]} | {:error, Error.t()}
  def apply_chat_template(tokenizer, messages, options \\ []) do
    options = Options.validate!(options, @apply, "Bombus.Tokenizer.apply_chat_template/3")
    tokenizer = tokenizer!(tokenizer)

    with {:ok, {:chat, messages, template} = prompt} <- chat(messages, tokenizer, options) do
      if options[:tokenize],
        do: ids(tokenizer, prompt, false),
        else: Native.await(&Native.apply_chat_template(tokenizer.ref, messages, template, &1))
    end
  end

  @doc "As `apply_chat_template/3`, but returns the text or the ids, or raises."
  @spec apply_chat_template!(t(), [message()], [apply_option()]) :: String.t() | [token_id()]
  def apply_chat_template!(tokenizer, messages, options \\ []),
    do: Error.unwrap!(apply_chat_template(tokenizer, messages, options))

  @doc """
  The conversation without its oldest turns, so that it has at most `max_tokens` tokens.

  A turn is a user's message with all that follows it up to the next: answers, calls of tools and
  their results go together. System messages stay, and so does the last turn: where these alone have
  more tokens, the answer is the error `:prompt_too_long`.

  ## Options

  #{Options.docs(@template_options)}
  ## Examples

      # Leave room for an answer of 512 tokens
      {:ok, messages} = Bombus.Tokenizer.fit(tokenizer, messages, model.spec.context - 512)
      Bombus.Serving.run(serving, %{messages: messages, max_new_tokens: 512})
  """
  @spec fit(t(), [message()], pos_integer(), [template_option()]) ::
          {:ok, [message()]} | {:error, Error.t()}
  def fit(tokenizer, messages, max_tokens, options \\ []) do
    options = Options.validate!(options, @template_options, "Bombus.Tokenizer.fit/4")
    tokenizer = tokenizer!(tokenizer)

    unless is_integer(max_tokens) and max_tokens > 0 do
      raise ArgumentError,
            "expected max_tokens to be a whole number above 0, got: #{Options.show(max_tokens)}"
    end

    # It raises for what is no list of messages.
    with {:ok, _prompt} <- chat(messages, tokenizer, options) do
      fewest(tokenizer, turns(messages), max_tokens, options, 0)
    end
  end

  @doc "As `fit/4`, but returns the messages or raises."
  @spec fit!(t(), [message()], pos_integer(), [template_option()]) :: [message()]
  def fit!(tokenizer, messages, max_tokens, options \\ []),
    do: Error.unwrap!(fit(tokenizer, messages, max_tokens, options))

  # Each message with the number of its turn; those that stay have none.
  defp turns(messages) do
    {turns, last} =
      Enum.map_reduce(messages, 0, fn message, turn ->
        case role(message) do
          "user" -> {{turn + 1, message}, turn + 1}
          role when role in ["system", "developer"] -> {{nil, message}, turn}
          _other -> {{turn, message}, turn}
        end
      end)

    {turns, last}
  end

  # Of a map or a list of pairs, whose names are atoms or strings.
  defp role(message) do
    Enum.find_value(message, fn {name, role} ->
      if to_string(name) == "role", do: to_string(role)
    end)
  end

  # How few turns must go is found by halving.
  defp fewest(tokenizer, {turns, last}, max_tokens, options, first) do
    middle = div(first + last, 2)
    messages = for {turn, message} <- turns, turn == nil or turn >= middle, do: message

    case count(tokenizer, messages, options) do
      {:ok, count} when count <= max_tokens and first == middle ->
        {:ok, messages}

      {:ok, count} when count <= max_tokens ->
        fewest(tokenizer, {turns, middle}, max_tokens, options, first)

      {:ok, count} when middle == last ->
        Error.error(
          :prompt_too_long,
          "#{count} tokens without any earlier turn, where #{max_tokens} may be"
        )

      {:ok, _count} ->
        fewest(tokenizer, {turns, last}, max_tokens, options, middle + 1)

      {:error, error} ->
        {:error, error}
    end
  end

  defp tokenizer!(tokenizer), do: Options.handle!(tokenizer, __MODULE__)

  defp ids(tokenizer, prompt, special),
    do: Native.await(&Native.encode(tokenizer.ref, prompt, special, &1))

  defp count_prompt(tokenizer, prompt),
    do: Native.await(&Native.count_tokens(tokenizer.ref, prompt, &1))

  defp prompt(text, _tokenizer, _options) when is_binary(text), do: text(text)

  defp prompt(%{text: text}, %{chat_template?: true} = tokenizer, options) do
    with {:ok, {:text, text}} <- text(text),
         do: chat([%{role: "user", content: text}], tokenizer, options)
  end

  defp prompt(%{text: text}, _tokenizer, _options), do: text(text)
  defp prompt(%{messages: messages}, tokenizer, options), do: chat(messages, tokenizer, options)

  defp prompt(%{"text" => text} = input, tokenizer, options)
       when not is_map_key(input, :messages),
       do: prompt(%{text: text}, tokenizer, options)

  defp prompt(%{"messages" => messages}, tokenizer, options),
    do: chat(messages, tokenizer, options)

  defp prompt(messages, tokenizer, options) when is_list(messages),
    do: chat(messages, tokenizer, options)

  defp prompt(other, _tokenizer, _options) do
    raise ArgumentError,
          "expected a text, a list of messages, %{text: text} or %{messages: messages}, " <>
            "got: #{Options.show(other)}"
  end

  defp text(text) when is_binary(text) do
    if String.valid?(text),
      do: {:ok, {:text, text}},
      else: Error.error(:bad_request, "expected a text in UTF-8, got: #{Options.show(text)}")
  end

  defp text(other) do
    raise ArgumentError, "expected a text, got: #{Options.show(other)}"
  end

  defp chat(_messages, %{chat_template?: false}, _options) do
    Error.error(:bad_request, "the tokenizer has no chat template: give a text, not messages")
  end

  defp chat(messages, tokenizer, options) do
    template_options =
      if options[:add_generation_prompt] == false,
        do: Map.put(options[:template_options], :add_generation_prompt, false),
        else: options[:template_options]

    Messages.prompt(messages, template_options, tokenizer)
  end

  defp ids!(ids) do
    unless Options.proper_list?(ids) do
      raise ArgumentError, "expected a list of token ids, got: #{Options.show(ids)}"
    end

    case Enum.find(ids, :none, &(not (is_integer(&1) and &1 in 0..0xFFFFFFFF))) do
      :none -> ids
      wrong -> raise ArgumentError, "expected token ids, got: #{Options.show(wrong)}"
    end
  end
end
