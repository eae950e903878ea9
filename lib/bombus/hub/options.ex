defmodule Bombus.Hub.Options do
  @moduledoc false
  # What a source's options and the environment say together, as in huggingface_hub's constants.py.

  alias Bombus.Hub.Token
  alias Bombus.Native

  @known [:revision, :cache_dir, :auth_token, :offline, :subdir, :on_progress]

  @doc "Raises for what is no id, or no option; a value is not shown where it may be a token."
  def check!(id, options, more \\ []) do
    unless is_binary(id) and valid_id?(id) do
      raise ArgumentError, "expected a Hub id like \"owner/name\", got: #{inspect(id)}"
    end

    unless Keyword.keyword?(options) do
      raise ArgumentError, "expected the options of #{inspect(id)} to be a keyword list"
    end

    case Keyword.keys(options) -- (@known ++ more) do
      [] ->
        :ok

      unknown ->
        raise ArgumentError,
              "unknown options #{inspect(unknown)} of {:hf, #{inspect(id)}, options}, " <>
                "the known ones are #{inspect(@known ++ more)}"
    end
  end

  @doc "What the NIF takes."
  def wanted!(id, options) do
    check!(id, options)
    on_progress!(options[:on_progress])

    %{
      id: id,
      revision: revision!(options[:revision] || "main"),
      subdir: options[:subdir] && subdir!(options[:subdir]),
      endpoint: endpoint(),
      cache: cache(options[:cache_dir]),
      token: with(token when is_binary(token) <- token(options), do: Native.hide_token(token)),
      offline: offline!(options[:offline]),
      # In milliseconds, before a second attempt. Not for users: tests have no time.
      pause: Application.get_env(:bombus, :hub_pause, 400)
    }
  end

  # The names that the Hub allows.
  defp valid_id?(id) do
    id =~ ~r{\A[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?\z} and not (id =~ ~r/--|\.\./)
  end

  defp revision!(revision), do: path!(revision, :revision, "a branch, a tag or a commit's hash")

  defp subdir!(subdir) when is_binary(subdir),
    do: subdir |> String.trim("/") |> path!(:subdir, "a folder within the repository")

  defp subdir!(other), do: path!(other, :subdir, "a folder within the repository")

  # It becomes a part of a path in the cache.
  defp path!(value, key, expected) do
    valid? =
      is_binary(value) and String.printable?(value) and not String.contains?(value, "\\") and
        Enum.all?(String.split(value, "/"), &(&1 not in ["", ".", ".."]))

    if valid?,
      do: value,
      else:
        raise(ArgumentError, "expected #{inspect(key)} to be #{expected}, got: #{inspect(value)}")
  end

  @doc "Raises where it is no function of one argument, nor nil."
  def on_progress!(nil), do: nil
  def on_progress!(fun) when is_function(fun, 1), do: fun

  def on_progress!(other) do
    raise ArgumentError,
          "expected :on_progress to be a function of one argument, got: #{inspect(other)}"
  end

  defp endpoint do
    endpoint = env("HF_ENDPOINT") || "https://huggingface.co"
    endpoint |> String.trim_trailing("/") |> utf8!("HF_ENDPOINT", "a URL")
  end

  defp cache(nil) do
    path = path("HF_HUB_CACHE") || path("HUGGINGFACE_HUB_CACHE") || Path.join(home(), "hub")
    utf8!(path, "HF_HUB_CACHE or HF_HOME", "a path")
  end

  defp cache(path) when is_binary(path),
    do: path |> Path.expand() |> utf8!(":cache_dir", "a path")

  defp cache(other) do
    raise ArgumentError, "expected :cache_dir to be a path, got: #{inspect(other)}"
  end

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
    case Token.wrap(options[:auth_token]) do
      nil -> if flag("HF_HUB_DISABLE_IMPLICIT_TOKEN"), do: nil, else: own_token()
      false -> nil
      %Token{value: value} when is_binary(value) -> clean!(value)
      _other -> raise ArgumentError, "expected :auth_token to be a string, or false for none"
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

  defp offline!(nil), do: flag("HF_HUB_OFFLINE") or flag("TRANSFORMERS_OFFLINE")
  defp offline!(offline) when is_boolean(offline), do: offline

  defp offline!(other) do
    raise ArgumentError, "expected :offline to be true or false, got: #{inspect(other)}"
  end

  @doc "Whether an environment variable says yes."
  def flag(name), do: String.upcase(env(name) || "") in ~w(1 ON YES TRUE)

  defp env(name) do
    value = System.get_env(name)
    if value not in [nil, ""], do: value
  end
end
