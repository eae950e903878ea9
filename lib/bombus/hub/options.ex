defmodule Bombus.Hub.Options do
  @moduledoc false
  # What a source's options and the environment say together, as in huggingface_hub's constants.py.

  alias Bombus.Hub.Token
  alias Bombus.{Native, Options}

  @on_progress [
    type: {:function, 1},
    type_spec: quote(do: (Bombus.Hub.progress() -> term())),
    doc: """
    a function that is called with a `t:Bombus.Hub.progress/0` about ten times a second while files
    come from the Hub, in the calling process
    """,
    by_default: """
    a bar where the standard error is a terminal (not where `HF_HUB_DISABLE_PROGRESS_BARS` is `1`)
    """
  ]

  @path {:custom, {__MODULE__, :check_path}}

  @schema [
    revision: [
      type: @path,
      type_spec: quote(do: String.t()),
      expected: "a branch, a tag or a commit's hash",
      by_default: ~s(`"main"`),
      doc: """
      a branch, a tag or a commit's hash. With a hash the Hub is not asked when all files are in the
      cache
      """
    ],
    subdir: [
      type: {:custom, {__MODULE__, :check_subdir}},
      type_spec: quote(do: String.t()),
      expected: "a folder within the repository",
      doc: "the folder within the repository"
    ],
    auth_token: [
      type: {:custom, {__MODULE__, :check_token}},
      type_spec: quote(do: String.t() | false),
      by_default: "`HF_TOKEN`, else what `hf auth login` has stored",
      doc: """
      the token for private and gated repositories; `false` is none. It is sent only to the endpoint,
      never to the hosts that files come from, and it is not shown in logs, errors or `inspect`
      """
    ],
    cache_dir: [
      type: :path,
      by_default: "`HF_HUB_CACHE`, else `hub` in `HF_HOME`, else `~/.cache/huggingface/hub`",
      doc: "the cache's folder"
    ],
    offline: [
      type: :boolean,
      by_default: "as `HF_HUB_OFFLINE` says",
      doc: "`true`: only what is in the cache"
    ],
    on_progress: @on_progress
  ]

  @doc "The options of a source."
  def schema, do: @schema

  @doc "An entry for the tables of those that take a source."
  def on_progress, do: @on_progress

  @doc "Raises for what is no id, or no option; -> the options with defaults"
  def validate!(id, options, more \\ []) do
    id!(id)
    what = if more == [], do: "{:hf, #{inspect(id)}, options}", else: "Bombus.Hub.download/2"
    Options.validate!(options, @schema ++ more, what)
  end

  @doc "Raises for what is no id."
  def id!(id) do
    unless is_binary(id) and valid_id?(id) do
      raise ArgumentError, "expected a Hub id like \"owner/name\", got: #{Options.show(id)}"
    end

    id
  end

  @doc "What the NIF takes."
  def wanted!(id, options) do
    options = validate!(id, options)

    %{
      id: id,
      revision: options[:revision] || "main",
      subdir: options[:subdir],
      endpoint: endpoint(),
      cache: cache(options[:cache_dir]),
      token: with(token when is_binary(token) <- token(options), do: Native.hide_token(token)),
      offline: offline(options[:offline]),
      # Not for users: tests have no time. In milliseconds, before a second attempt; over which a body
      # must not be too slow; the bytes of a file whose size nobody says.
      pause: Application.get_env(:bombus, :hub_pause, 400),
      pace: Application.get_env(:bombus, :hub_pace, 20_000),
      most: Application.get_env(:bombus, :hub_most, 0x4000_0000)
    }
  end

  # The names that the Hub allows.
  defp valid_id?(id) do
    id =~ ~r{\A[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?\z} and not (id =~ ~r/--|\.\./)
  end

  @doc false
  def check_subdir(subdir) when is_binary(subdir), do: subdir |> String.trim("/") |> check_path()
  def check_subdir(_other), do: :error

  @doc false
  # It becomes a part of a path in the cache.
  def check_path(value) do
    plain? =
      is_binary(value) and byte_size(value) <= 1024 and String.printable?(value) and
        not String.contains?(value, "\\") and
        Enum.all?(String.split(value, "/"), &(&1 not in ["", ".", ".."]))

    if plain?, do: {:ok, value}, else: :error
  end

  @doc false
  def check_token(false), do: {:ok, false}
  def check_token(%Token{value: value}) when is_binary(value), do: {:ok, Token.wrap(value)}
  def check_token(value) when is_binary(value), do: {:ok, Token.wrap(value)}

  # The value may be one that is only wrapped in something: it is not shown.
  def check_token(_other) do
    raise ArgumentError, "expected :auth_token to be a string, or false for none"
  end

  defp endpoint do
    endpoint = env("HF_ENDPOINT") || "https://huggingface.co"
    endpoint |> String.trim_trailing("/") |> utf8!("HF_ENDPOINT", "a URL")
  end

  @doc "The cache's folder."
  def cache(nil) do
    path = path("HF_HUB_CACHE") || path("HUGGINGFACE_HUB_CACHE") || Path.join(home(), "hub")
    utf8!(path, "HF_HUB_CACHE or HF_HOME", "a path")
  end

  def cache(path), do: Path.expand(path)

  defp utf8!(value, name, expected) do
    if String.valid?(value),
      do: value,
      else: raise(ArgumentError, "expected #{name} to be #{expected} in UTF-8")
  end

  defp home do
    path("HF_HOME") || Path.join(path("XDG_CACHE_HOME") || Path.expand("~/.cache"), "huggingface")
  end

  # As Python's expandvars and expanduser.
  defp path(name) do
    if value = env(name) do
      ~r/\$(?:\{(\w+)\}|(\w+))/
      |> Regex.replace(value, fn whole, braced, bare -> env(braced <> bare) || whole end)
      |> Path.expand()
    end
  end

  defp token(options) do
    case options[:auth_token] do
      nil -> if flag("HF_HUB_DISABLE_IMPLICIT_TOKEN"), do: nil, else: own_token()
      false -> nil
      %Token{value: value} -> clean!(value)
    end
  end

  defp own_token do
    file = path("HF_TOKEN_PATH") || Path.join(home(), "token")

    cond do
      token = env("HF_TOKEN") -> clean!(token)
      token = env("HUGGING_FACE_HUB_TOKEN") -> clean!(token)
      match?({:ok, _text}, File.read(file)) -> clean!(File.read!(file))
      true -> nil
    end
  end

  # It becomes a header.
  defp clean!(token) do
    case String.trim(token) do
      "" ->
        nil

      token ->
        if token =~ ~r/\A[!-~]+\z/,
          do: token,
          else: raise(ArgumentError, "expected the token to be letters, digits and signs")
    end
  end

  defp offline(nil), do: flag("HF_HUB_OFFLINE") or flag("TRANSFORMERS_OFFLINE")
  defp offline(offline), do: offline

  @doc "Whether an environment variable says yes."
  def flag(name), do: String.upcase(env(name) || "") in ~w(1 ON YES TRUE)

  defp env(name) do
    value = System.get_env(name)
    if value not in [nil, ""], do: value
  end
end
