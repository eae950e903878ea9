defmodule Bombus.FormatTest do
  # Texts that keep to a format, through a serving: the shipped model knows nothing of JSON, and writes it.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Serving}

  setup_all do
    model = Bombus.load_model!(:demo, device: :cpu)
    %{serving: Serving.new(model, Bombus.load_tokenizer!(:demo), max_new_tokens: 200, seed: 7)}
  end

  defp text(serving, format, more \\ %{}) do
    input = Map.merge(%{text: "Write about tea", format: format}, more)
    assert %{results: [%{text: text, finish_reason: :stop}]} = Serving.run(serving, input)
    text
  end

  @schema [
    type: "object",
    properties: [
      stars: [type: "integer", minimum: 1, maximum: 5],
      about: [enum: ["tea", "sea"]],
      ok: [type: "boolean"]
    ],
    required: ["stars", "about", "ok"],
    additionalProperties: false
  ]

  test "a schema's text is JSON of its form, in its order", %{serving: serving} do
    for schema <- [@schema, JSON.encode!(json(@schema))], temperature <- [0, 1.2] do
      text = text(serving, {:json_schema, schema}, %{temperature: temperature})
      assert %{"stars" => stars, "about" => about, "ok" => ok} = value = JSON.decode!(text)
      assert map_size(value) == 3 and stars in 1..5 and about in ["tea", "sea"] and is_boolean(ok)
    end

    assert text(serving, {:json_schema, @schema}) =~ ~r/^\{"stars": \d, "about": "/
  end

  # A keyword list as a map.
  defp json([{name, _value} | _rest] = pairs) when is_atom(name),
    do: Map.new(pairs, fn {name, value} -> {name, json(value)} end)

  defp json(other), do: other

  test "expressions, grammars, and JSON of any kind", %{serving: serving} do
    assert text(serving, {:regex, "(red|blue) [0-9]{2}"}) =~ ~r/^(red|blue) [0-9]{2}$/

    assert text(serving, {:grammar, ~s(start: "yes" | "no, " /[a-z]{3}/)}) =~
             ~r/^(yes|no, [a-z]{3})$/

    object = {:json_schema, %{type: "object", maxProperties: 0}}
    assert text(serving, object) == "{}"

    case Serving.run(serving, %{text: "Tea", format: :json, max_new_tokens: 60}) do
      %{results: [%{text: text, finish_reason: :stop}]} -> assert is_map(JSON.decode!(text))
      %{results: [%{text: "{" <> _rest, finish_reason: :length}]} -> :ok
    end
  end

  test "a stream, a list of inputs, and a serving of its own", %{serving: serving} do
    input = %{text: "Tea", format: {:regex, "(one|two), three, four"}}
    streamed = serving |> Serving.stream(input) |> Enum.join()
    assert %{results: [%{text: ^streamed}]} = Serving.run(serving, input)
    assert streamed =~ ~r/^(one|two), three, four$/

    assert [%{results: [%{text: first}]}, %{results: [%{text: second}]}] =
             Serving.run(serving, [input, "Write about tea"])

    assert first == streamed
    assert %{results: [%{text: ^second}]} = Serving.run(serving, "Write about tea")

    own = Serving.new(serving.model, serving.tokenizer, format: {:regex, "a{3}"}, seed: 1)
    assert %{results: [%{text: "aaa"}]} = Serving.run(own, "Tea")
    assert %{results: [%{text: other}]} = Serving.run(own, %{text: "Tea", format: nil})
    assert other != "aaa"
  end

  test "what cannot be kept to is an error with its place", %{serving: serving} do
    for {format, word} <- [
          {{:json_schema, %{type: "objekt"}}, "objekt"},
          {{:json_schema, %{unevaluatedItems: false}}, "unevaluatedItems"},
          {{:regex, "("}, "format"},
          {{:grammar, "start: other"}, "other"}
        ] do
      assert {:error, %Error{reason: :bad_request} = error} =
               Serving.run(serving, %{text: "Tea", format: format})

      assert error.message =~ word
    end

    for {format, word} <- [
          {:xml, ":xml"},
          {{:json_schema, "{"}, "no JSON text"},
          {{:json_schema, %{type: self()}}, "JSON has no"},
          {{:json_schema, [{"a", 1}, {"a", 2}]}, "twice"},
          {{:regex, ~r/a/}, "as a string"},
          {{:regex, <<255>>}, "UTF-8"},
          {{:grammar, 1}, "{:grammar, text}"}
        ] do
      error =
        assert_raise ArgumentError, fn -> Serving.run(serving, %{text: "Tea", format: format}) end

      assert error.message =~ word and error.message =~ ":format"
    end
  end
end
